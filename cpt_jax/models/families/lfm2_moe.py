"""LFM2 with experts, chosen by sigmoids with a bias, in all but the first layers."""

from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.families import lfm2, routed
from cpt_jax.models.families.schema import Names, config_of, read, renamed
from cpt_jax.models.router import RouterConfig

MODEL_TYPES = ("lfm2_moe",)
EXPERTS = "feed_forward.experts"
_RENAMED = {"feed_forward.gate.e_score_correction_bias": "feed_forward.expert_bias"}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    experts = ExpertsConfig(
        count=hf.num_experts,
        per_token=hf.num_experts_per_tok,
        renormalise=bool(hf.norm_topk_prob),
        balance_coefficient=routed.balance_coefficient(hf),
        intermediate_size=hf.moe_intermediate_size,
        router=RouterConfig(
            scores="sigmoid",
            correction_bias=bool(hf.use_expert_bias),
            epsilon=1e-6,
            scale=float(hf.routed_scaling_factor),
        ),
    )
    return config_of(
        hf,
        mixers=lfm2.mixers(hf),
        experts=experts,
        dense_layers=hf.num_dense_layers,
        norm_epsilon=float(hf.norm_eps),
        activation="silu",
        qk_norm="head",
    )


def layer_fields(config: DecoderConfig) -> dict[str, Any]:
    """What a config.json says of its layers besides `layer_types`, which it calls otherwise."""
    types = ["full_attention" if kind.attends else "conv" for kind in config.kind_of_layer]
    return {"layer_types": types, "num_dense_layers": config.dense_layers}


def weight_names(config: DecoderConfig) -> Names:
    return renamed(lfm2.weight_names(config), _RENAMED)
