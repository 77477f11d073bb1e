"""dots.llm1: Qwen3's attention; experts that are routed as DeepSeek-V3's, in all but the first layers."""

from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import routed
from cpt_jax.models.families.schema import Names, attention_biases, config_of, read

MODEL_TYPES = ("dots1",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    return config_of(
        hf,
        experts=routed.experts_of(hf, hf.n_routed_experts, hf.n_shared_experts or 0),
        dense_layers=hf.first_k_dense_replace or 0,
        qk_norm="head",
        **attention_biases(hf),
    )


def layer_fields(config: DecoderConfig) -> dict[str, Any]:
    """What a deeper model's config.json says of its layers besides `layer_types`."""
    return {"first_k_dense_replace": config.dense_layers}


def weight_names(config: DecoderConfig) -> Names:
    return routed.weight_names(config)
