"""Mixtures of experts: Qwen3-MoE (Qwen3 whose feed-forward is chosen by a router) and Mixtral (Mistral, likewise)."""

from cpt_jax.models.decoder import DecoderConfig
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.families.schema import (
    NORMS,
    Names,
    Place,
    attention_names,
    config_of,
    norm_names,
    outer_names,
    read,
)

MODEL_TYPES = ("qwen3_moe", "mixtral")
UNSUPPORTED = {"decoder_sparse_step": (1,), "mlp_only_layers": (None, [])}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    qwen = raw["model_type"] == "qwen3_moe"
    experts = ExpertsConfig(
        count=hf.num_local_experts if not qwen else hf.num_experts,
        per_token=hf.num_experts_per_tok,
        renormalise=bool(hf.norm_topk_prob) if qwen else True,
        balance_coefficient=float(hf.router_aux_loss_coef),
    )
    if not qwen:
        return config_of(hf, experts=experts)
    biased = bool(hf.attention_bias)
    return config_of(
        hf,
        experts=experts,
        intermediate_size=hf.moe_intermediate_size,
        qk_norm="head",
        qkv_bias=biased,
        attention_out_bias=biased,
    )


def weight_names(config: DecoderConfig) -> Names:
    assert config.experts is not None
    # Of the two, Qwen3-MoE alone normalises queries and keys.
    if config.qk_norm is not None:
        block, matrices = "mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    else:
        block, matrices = "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}
    names = outer_names(config)
    for layer in range(config.num_layers):
        names |= attention_names(config, layer) | norm_names(layer, NORMS)
        prefix = f"model.layers.{layer}.{block}"
        names[f"{prefix}.gate.weight"] = (Place("layers/mlp/router", (layer,), True),)
        for expert in range(config.experts.count):
            for ours, hf in matrices.items():
                place = Place(f"layers/mlp/{ours}/kernel", (layer, expert), True)
                names[f"{prefix}.experts.{expert}.{hf}.weight"] = (place,)
    return names
