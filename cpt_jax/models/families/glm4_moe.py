"""GLM-4.5, 4.6 and 4.7: half of each head rotated, biases on queries, keys and values, queries and keys normalised in the
large ones; experts that are routed as DeepSeek-V3's, in all but the first layers."""

from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import routed
from cpt_jax.models.families.schema import Names, config_of, read

MODEL_TYPES = ("glm4_moe",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    return config_of(
        hf,
        experts=routed.experts_of(hf, hf.n_routed_experts, hf.n_shared_experts),
        dense_layers=hf.first_k_dense_replace,
        qkv_bias=bool(hf.attention_bias),
        qk_norm="head" if hf.use_qk_norm else None,
    )


def layer_fields(config: DecoderConfig) -> dict[str, Any]:
    """What a deeper model's config.json says of its layers: what predicts several tokens does not fit it."""
    return {"first_k_dense_replace": config.dense_layers, "num_nextn_predict_layers": 0}


def weight_names(config: DecoderConfig) -> Names:
    return routed.weight_names(config)


def unread(config: DecoderConfig) -> tuple[str, ...]:
    return routed.next_tokens(config)
