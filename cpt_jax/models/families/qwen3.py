"""Qwen3: Llama with queries and keys normalised head by head, and a sliding window in the upper layers if asked for."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import NORMS, Names, attention_biases, config_of, read, standard_names

MODEL_TYPES = ("qwen3",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    return config_of(hf, qk_norm="head", **attention_biases(hf))


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
