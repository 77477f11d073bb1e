"""ERNIE 4.5, dense: Llama with neighbours rotated against each other, and biases everywhere if asked for."""

from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import NORMS, Names, config_of, read, standard_names

MODEL_TYPES = ("ernie4_5",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    return config_of(hf, **differences(hf))


def differences(hf: Any) -> dict[str, Any]:
    """What it has in common with those that have experts."""
    bias = bool(hf.use_bias)
    return dict(interleaved_rotation=True, qkv_bias=bias, attention_out_bias=bias, mlp_bias=bias)


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
