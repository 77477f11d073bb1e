"""Qwen3: Llama with queries and keys normalised head by head, and a sliding window in the upper layers if asked for."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import NORMS, Names, config_of, read, standard_names

MODEL_TYPES = ("qwen3",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    biased = bool(hf.attention_bias)
    return config_of(hf, qk_norm="head", qkv_bias=biased, attention_out_bias=biased)


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
