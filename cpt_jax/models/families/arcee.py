"""Arcee's AFM: Llama without gates, with the square of ReLU."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import llama
from cpt_jax.models.families.schema import NORMS, Names, attention_biases, config_of, read, standard_names

MODEL_TYPES = ("arcee",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, llama.UNSUPPORTED)
    return config_of(hf, gated=False, **attention_biases(hf), mlp_bias=bool(hf.mlp_bias))


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
