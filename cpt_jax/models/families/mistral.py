"""Mistral 7B and its kin: Llama with a sliding window in every layer."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import NORMS, Names, config_of, read, standard_names

MODEL_TYPES = ("mistral",)
UNSUPPORTED = {"layer_types": (None,)}


def config_from_hf(raw: dict) -> DecoderConfig:
    return config_of(read(raw, UNSUPPORTED))


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
