"""Seed-OSS: Llama with biases on queries, keys and values, and another switch for that of attention's output."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import NORMS, Names, config_of, read, standard_names

MODEL_TYPES = ("seed_oss",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    return config_of(
        hf,
        qkv_bias=bool(hf.attention_bias),
        attention_out_bias=bool(hf.attention_out_bias),
        mlp_bias=bool(hf.mlp_bias),
    )


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
