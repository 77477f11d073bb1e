"""GLM-4.7-Flash: DeepSeek V3 in all but what its config.json calls the first layers."""

from typing import Any

from cpt_jax.core.errors import UserError
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import routed
from cpt_jax.models.families.deepseek_v3 import latent_attention
from cpt_jax.models.families.schema import Names, config_of, read

MODEL_TYPES = ("glm4_moe_lite",)
UNSUPPORTED = {"topk_method": ("noaux_tc",)}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    types = hf.mlp_layer_types
    dense = types.index("sparse") if "sparse" in types else len(types)
    if types != ["dense"] * dense + ["sparse"] * (hf.num_hidden_layers - dense):
        raise UserError(
            f"config.json has mlp_layer_types={types}, which is not supported: the first layers dense, the others sparse, {hf.num_hidden_layers} in all"
        )
    experts = routed.experts_of(hf, hf.n_routed_experts, hf.n_shared_experts)
    whole = dense == hf.num_hidden_layers
    return config_of(hf, **latent_attention(hf), experts=None if whole else experts, dense_layers=0 if whole else dense)


def layer_fields(config: DecoderConfig) -> dict[str, Any]:
    """What a deeper model's config.json says of its layers: what predicts several tokens does not fit it."""
    dense = config.num_layers if config.experts is None else config.dense_layers
    types = ["dense"] * dense + ["sparse"] * (config.num_layers - dense)
    return {"mlp_layer_types": types, "num_nextn_predict_layers": 0}


def weight_names(config: DecoderConfig) -> Names:
    return routed.weight_names(config)


def unread(config: DecoderConfig) -> tuple[str, ...]:
    return routed.next_tokens(config)
