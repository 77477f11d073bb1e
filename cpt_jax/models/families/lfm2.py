"""LFM2: in most layers a gated short convolution in the place of attention; Qwen3's attention in the others; all under
names of their own."""

from collections.abc import Mapping
from typing import Any

from cpt_jax.models.config import DecoderConfig, Mixer
from cpt_jax.models.families.routed import feed_forward_names
from cpt_jax.models.families.schema import (
    Names,
    Place,
    Rows,
    attention_names,
    config_of,
    fused,
    linear,
    norm_names,
    outer_names,
    read,
    renamed,
    stack_of,
)
from cpt_jax.models.short_conv import ShortConvConfig

MODEL_TYPES = ("lfm2",)
NORMS = {"attention_norm": "operator_norm", "mlp_norm": "ffn_norm"}
MLP = {"gate": "w1", "up": "w3", "down": "w2"}
_RENAMED = {".mlp.": ".feed_forward.", "model.norm.": "model.embedding_norm."}
_ATTENTION = {"q_norm": "q_layernorm", "k_norm": "k_layernorm", "o_proj": "out_proj"}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    return config_of(
        hf,
        mixers=mixers(hf),
        intermediate_size=_inner_width(hf),
        norm_epsilon=float(hf.norm_eps),
        activation="silu",
        qk_norm="head",
    )


def mixers(hf: Any) -> dict[str, Mixer]:
    return {"conv": ShortConvConfig(kernel_size=hf.conv_L_cache, bias=bool(hf.conv_bias))}


def _inner_width(hf: Any) -> int:
    """Two thirds of what is written there, and more."""
    width = hf.intermediate_size
    if not hf.block_auto_adjust_ff_dim:
        return width
    width = int(2 * width / 3)
    if hf.block_ffn_dim_multiplier is None:
        return width
    multiple = hf.block_multiple_of
    return -(-int(hf.block_ffn_dim_multiplier * width) // multiple) * multiple


def weight_names(config: DecoderConfig) -> Names:
    names = names_of(config, NORMS)
    return renamed(names, {f"self_attn.{ours}": f"self_attn.{theirs}" for ours, theirs in _ATTENTION.items()})


def names_of(config: DecoderConfig, norms: Mapping[str, str]) -> Names:
    """What LFM2, with experts or without, and LFM3 have in common."""
    names = outer_names(config)
    for layer, kind in enumerate(config.kind_of_layer):
        mixer = attention_names if kind.attends else short_conv_names
        names |= mixer(config, layer) | feed_forward_names(config, layer, MLP) | norm_names(config, layer, norms)
    return renamed(names, _RENAMED)


def short_conv_names(config: DecoderConfig, layer: int) -> Names:
    """Those of a layer with a convolution."""
    prefix, width = f"model.layers.{layer}.conv", config.hidden_size
    path, number = stack_of(config, layer, "short_conv")
    sizes = config.kind_of_layer[layer].mixer
    assert isinstance(sizes, ShortConvConfig)
    parts = {f"{path}/{name}": Rows(3 * width, i * width, (i + 1) * width) for i, name in enumerate("kqv")}
    names = fused(f"{prefix}.in_proj", parts, number, sizes.bias)
    names |= linear(f"{prefix}.out_proj", f"{path}/o", number, sizes.bias)
    names[f"{prefix}.conv.weight"] = (Place(f"{path}/conv", (number,)),)
    return names | ({f"{prefix}.conv.bias": (Place(f"{path}/bias", (number,)),)} if sizes.bias else {})
