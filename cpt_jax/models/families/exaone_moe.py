"""K-EXAONE: EXAONE 4's attention, with norms before it and before the feed-forward; experts that are routed as
DeepSeek-V3's, in all but the first layers."""

from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import exaone4, routed
from cpt_jax.models.families.schema import Names, config_of, read, renamed

MODEL_TYPES = ("exaone_moe",)
# What predicts several tokens, which transformers does not read.
BESIDE = ("mtp.",)
_BIAS = {"mlp.gate.e_score_correction_bias": "mlp.e_score_correction_bias"}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    has_experts = [each == "sparse" for each in hf.mlp_layer_types]
    return config_of(
        hf,
        rotated=exaone4.rotated(hf),
        experts=routed.experts_of(hf, hf.num_experts, hf.num_shared_experts),
        dense_layers=routed.dense_first(has_experts, "mlp_layer_types"),
        qk_norm="head",
    )


def layer_fields(config: DecoderConfig) -> dict[str, Any]:
    """What a deeper model's config.json says of its layers besides `layer_types`."""
    dense = config.dense_layers
    types = ["dense"] * dense + ["sparse"] * (config.num_layers - dense)
    return {"mlp_layer_types": types, "first_k_dense_replace": dense}


def weight_names(config: DecoderConfig) -> Names:
    return renamed(routed.weight_names(config), _BIAS)
