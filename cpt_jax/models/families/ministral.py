"""Ministral 8B of 2024, as transformers' own type: Mistral with a window in the layers that `layer_types` names."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import NORMS, Names, config_of, read, standard_names

MODEL_TYPES = ("ministral",)


def config_from_hf(raw: dict) -> DecoderConfig:
    return config_of(read(raw, {}))


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
