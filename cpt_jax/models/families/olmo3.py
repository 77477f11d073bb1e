"""OLMo 3: OLMo 2 with a window in three of four layers; only the rotation of the layers that see all is stretched."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import olmo2
from cpt_jax.models.families.schema import Names

MODEL_TYPES = ("olmo3",)


def config_from_hf(raw: dict) -> DecoderConfig:
    return olmo2.config_from_hf(raw)


def weight_names(config: DecoderConfig) -> Names:
    return olmo2.weight_names(config)
