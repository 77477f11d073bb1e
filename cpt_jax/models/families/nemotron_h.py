"""Nemotron-H, Nemotron Nano 2 and Nemotron 3 Nano: each layer is Mamba 2, or attention that turns nothing by positions, or
a feed-forward without a gate, or a few such experts, chosen as DeepSeek-V3 does; none has two of them."""

import dataclasses
from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.families import routed
from cpt_jax.models.families.granitemoehybrid import mamba2_names
from cpt_jax.models.families.schema import (
    Names,
    attention_names,
    config_of,
    experts_names,
    linear,
    norm_names,
    outer_names,
    read,
    renamed,
    stack_of,
)
from cpt_jax.models.lone_feed_forward import LoneExpertsConfig, LoneFeedForwardConfig
from cpt_jax.models.mamba2 import Mamba2Config

MODEL_TYPES = ("nemotron_h",)
MODULES = {"backbone.": "model."}
# PEFT has no adapters of these (tuners_utils.py, _check_lora_target_modules_mamba).
NOT_ADAPTED = ("out_proj",)
# What predicts several tokens, which transformers does not read.
BESIDE = ("mtp.",)
EXPERTS = "mixer.experts"
UNSUPPORTED = {"mamba_hidden_act": ("silu", "swish"), "moe_latent_size": (None,)}
_MLP = {"up": "up_proj", "down": "down_proj"}
_RENAMED = {
    "model.embed_tokens.": "backbone.embeddings.",
    "model.norm.": "backbone.norm_f.",
    "model.layers.": "backbone.layers.",
    ".self_attn.": ".mixer.",
    ".mamba.": ".mixer.",
}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    return config_of(
        hf,
        rotated=[False] * hf.num_hidden_layers,
        mixers={"linear_attention": _mamba2(hf), "mlp": LoneFeedForwardConfig(), "moe": LoneExpertsConfig()},
        experts=_experts(hf) if "moe" in hf.layer_types else None,
        # transformers ties no head of this family, whatever its config says.
        tie_word_embeddings=False,
        feed_forward=False,
        gated=False,
        activation=hf.mlp_hidden_act,
        mlp_bias=bool(hf.mlp_bias),
        norm_epsilon=float(hf.layer_norm_epsilon),
    )


def _experts(hf: Any) -> ExpertsConfig:
    """The shared one has a width of its own."""
    experts = routed.experts_of(hf, hf.n_routed_experts, shared=0)
    return dataclasses.replace(experts, shared_intermediate_size=hf.moe_shared_expert_intermediate_size)


def _mamba2(hf: Any) -> Mamba2Config:
    return Mamba2Config(
        heads=hf.mamba_num_heads,
        groups=hf.n_groups,
        head_dim=hf.mamba_head_dim,
        state_size=hf.ssm_state_size,
        kernel_size=hf.conv_kernel,
        conv_bias=bool(hf.use_conv_bias),
        bias=bool(hf.use_bias),
        out_bias=bool(hf.use_bias),
        # transformers' limits of this family; its `time_step_limit` it does not look at.
        step_limits=(float(hf.time_step_min), float("inf")),
    )


def layer_fields(config: DecoderConfig) -> dict[str, Any]:
    """The kinds as the makers' config.json says them, and transformers'."""
    letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
    types = [kind.layer_type for kind in config.kind_of_layer]
    return {"hybrid_override_pattern": "".join(letters[each] for each in types), "layers_block_type": types}


def weight_names(config: DecoderConfig) -> Names:
    names = outer_names(config)
    for layer, kind in enumerate(config.kind_of_layer):
        names |= norm_names(config, layer, {"attention_norm": "norm"})
        match kind.mixer:
            case Mamba2Config():
                names |= mamba2_names(config, layer)
            case LoneFeedForwardConfig():
                names |= _feed_forward_names(config, layer)
            case LoneExpertsConfig():
                names |= experts_names(config, layer, "mixer", _MLP, shared="shared_experts")
            case _:
                names |= attention_names(config, layer)
    return renamed(names, _RENAMED)


def _feed_forward_names(config: DecoderConfig, layer: int) -> Names:
    path, place = stack_of(config, layer, "feed_forward")
    names: Names = {}
    for ours, theirs in _MLP.items():
        names |= linear(f"model.layers.{layer}.mixer.{theirs}", f"{path}/mlp/{ours}", place, config.mlp_bias)
    return names
