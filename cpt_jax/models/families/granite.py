"""Granite 3 and the dense Granite 4 of its type: Llama with four multipliers, of embeddings, attention scores, what blocks
add, and logits."""

from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import NORMS, Names, attention_biases, config_of, read, standard_names

MODEL_TYPES = ("granite",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    return config_of(
        hf,
        **attention_biases(hf),
        **multipliers(hf),
        mlp_bias=bool(hf.mlp_bias),
    )


def multipliers(hf: Any) -> dict[str, Any]:
    """Granite's four, of a config as transformers reads it."""
    return {
        "embedding_scale": float(hf.embedding_multiplier),
        "attention_scale": float(hf.attention_multiplier),
        "residual_scale": float(hf.residual_multiplier),
        "logit_scale": 1 / float(hf.logits_scaling),
    }


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
