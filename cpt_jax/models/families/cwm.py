"""Code World Model: Llama with a window in all but every fourth layer."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import NORMS, Names, config_of, read, standard_names

MODEL_TYPES = ("cwm",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    return config_of(hf, mlp_bias=bool(hf.mlp_bias))


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
