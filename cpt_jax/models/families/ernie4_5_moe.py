"""ERNIE 4.5 with experts, text: in all but the first layers, chosen by a softmax with a correction bias, and a shared expert
without a gate."""

import dataclasses
from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.families import ernie4_5, routed
from cpt_jax.models.families.schema import Names, config_of, read, renamed
from cpt_jax.models.router import RouterConfig

MODEL_TYPES = ("ernie4_5_moe",)
# What predicts several tokens, which transformers does not read.
BESIDE = ("model.mtp_",)
# A bias would be of the head too.
UNSUPPORTED = {"use_bias": (None, False), "moe_layer_interval": (None, 1)}
_BIAS = {"mlp.gate.e_score_correction_bias": "mlp.moe_statics.e_score_correction_bias"}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    layers = range(hf.num_hidden_layers)
    has_experts = [hf.moe_layer_start_index <= layer <= hf.moe_layer_end_index for layer in layers]
    experts = ExpertsConfig(
        count=hf.num_experts,
        per_token=hf.num_experts_per_tok,
        renormalise=True,
        balance_coefficient=routed.balance_coefficient(hf),
        shared_intermediate_size=hf.moe_num_shared_experts * hf.moe_intermediate_size or None,
        shared_gate=False,
        intermediate_size=hf.moe_intermediate_size,
        router=RouterConfig(correction_bias=True),
    )
    dense = routed.dense_first(has_experts, "moe_layer_end_index")
    return config_of(hf, experts=experts, dense_layers=dense, **ernie4_5.differences(hf))


def layer_fields(config: DecoderConfig) -> dict[str, Any]:
    """What a deeper model's config.json says of its layers."""
    return {"moe_layer_start_index": config.dense_layers, "moe_layer_end_index": config.num_layers - 1}


def weight_names(config: DecoderConfig) -> Names:
    """The bias is a row of a matrix there."""
    names = renamed(routed.weight_names(config), _BIAS)
    rows = {name: places for name, places in names.items() if name.endswith("moe_statics.e_score_correction_bias")}
    return names | {name: tuple(dataclasses.replace(place, member=0) for place in rows[name]) for name in rows}
