"""Youtu-LLM: DeepSeek V3's attention in a dense model."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.deepseek_v3 import latent_attention
from cpt_jax.models.families.schema import NORMS, Names, config_of, read, standard_names

MODEL_TYPES = ("youtu",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    return config_of(hf, **latent_attention(hf))


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
