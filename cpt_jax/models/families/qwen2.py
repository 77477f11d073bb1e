"""Qwen2 and 2.5: Llama with biases on queries, keys and values, and a sliding window in the upper layers if asked
for."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import NORMS, Names, config_of, read, standard_names

MODEL_TYPES = ("qwen2",)


def config_from_hf(raw: dict) -> DecoderConfig:
    return config_of(read(raw, {}), qkv_bias=True)


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
