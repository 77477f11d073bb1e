"""Granite 3 with experts, and with a feed-forward beside them that every token goes through."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import granitemoehybrid
from cpt_jax.models.families.granite import multipliers
from cpt_jax.models.families.schema import Names, attention_biases, config_of, read

MODEL_TYPES = ("granitemoe", "granitemoeshared")
EXPERTS = granitemoehybrid.EXPERTS


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    shared = getattr(hf, "shared_intermediate_size", None) or None
    return config_of(hf, experts=granitemoehybrid.experts_of(hf, shared), **multipliers(hf), **attention_biases(hf))


def weight_names(config: DecoderConfig) -> Names:
    return granitemoehybrid.weight_names(config)
