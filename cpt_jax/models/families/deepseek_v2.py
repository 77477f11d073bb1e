"""DeepSeek V2, V2-Lite and Coder V2: DeepSeek V3's attention; experts are chosen by a softmax, among all or those of the
groups that have the best one."""

from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.families import routed
from cpt_jax.models.families.deepseek_v3 import latent_attention
from cpt_jax.models.families.schema import Names, config_of, read
from cpt_jax.models.router import RouterConfig

MODEL_TYPES = ("deepseek_v2",)
# What transformers does not look at, or does not know.
UNSUPPORTED = {
    "moe_layer_freq": (1,),
    "scoring_func": ("softmax",),
    "norm_topk_prob": (False, None),
    "topk_method": ("greedy", "group_limited_greedy"),
}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    dense = hf.first_k_dense_replace >= hf.num_hidden_layers
    return config_of(
        hf,
        **latent_attention(hf, interleaved=True),
        mlp_bias=bool(hf.mlp_bias),
        experts=None if dense else _experts(hf),
        dense_layers=0 if dense else hf.first_k_dense_replace,
    )


def _experts(hf: Any) -> ExpertsConfig:
    grouped = hf.topk_method == "group_limited_greedy"
    return ExpertsConfig(
        count=hf.n_routed_experts,
        per_token=hf.num_experts_per_tok,
        renormalise=False,
        balance_coefficient=routed.balance_coefficient(hf),
        shared_intermediate_size=hf.n_shared_experts * hf.moe_intermediate_size,
        shared_gate=False,
        intermediate_size=hf.moe_intermediate_size,
        router=RouterConfig(
            groups=hf.n_group if grouped else 1,
            chosen_groups=hf.topk_group if grouped else 1,
            best_of_group=1,
            scale=float(hf.routed_scaling_factor),
        ),
    )


def layer_fields(config: DecoderConfig) -> dict[str, Any]:
    """What a config.json says of its layers besides `layer_types`."""
    return {"first_k_dense_replace": config.num_layers if config.experts is None else config.dense_layers}


def weight_names(config: DecoderConfig) -> Names:
    return routed.weight_names(config)
