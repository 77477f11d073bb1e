"""Helium: Llama with neighbours rotated against each other."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import NORMS, Names, config_of, read, standard_names

MODEL_TYPES = ("helium",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    return config_of(hf, interleaved_rotation=True, qkv_bias=bool(hf.attention_bias), mlp_bias=bool(hf.mlp_bias))


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
