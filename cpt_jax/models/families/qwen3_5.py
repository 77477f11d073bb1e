"""Qwen3.5, text: in three of four layers Gated DeltaNet in the place of attention; in the others Qwen3's attention with
gated heads, of which a quarter is turned by positions; norms' scales are stored less one."""

from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.delta_net import DeltaNetConfig
from cpt_jax.models.families.schema import (
    MLP,
    NORMS,
    Names,
    Place,
    Rows,
    attention_names,
    config_of,
    fused,
    linear,
    mlp_names,
    norm_names,
    outer_names,
    read,
)

MODEL_TYPES = ("qwen3_5_text",)
UNSUPPORTED = {"attention_bias": (False,), "attn_output_gate": (True,)}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    return config_of(
        hf, mixers={"linear_attention": delta_net(hf)}, norm_offset=1.0, qk_norm="head", attention_gate="channel"
    )


def delta_net(hf: Any) -> DeltaNetConfig:
    return DeltaNetConfig(
        key_heads=hf.linear_num_key_heads,
        value_heads=hf.linear_num_value_heads,
        key_dim=hf.linear_key_head_dim,
        value_dim=hf.linear_value_head_dim,
        kernel_size=hf.linear_conv_kernel_dim,
    )


def weight_names(config: DecoderConfig) -> Names:
    names = outer_names(config)
    for layer, kind in enumerate(config.kind_of_layer):
        if isinstance(kind.mixer, DeltaNetConfig):
            names |= delta_net_names(config, layer, kind.mixer)
        else:
            names |= attention_names(config, layer)
        names |= mlp_names(config, layer, MLP) | norm_names(config, layer, NORMS)
    return names


def delta_net_names(config: DecoderConfig, layer: int, sizes: DeltaNetConfig) -> Names:
    """Those of a layer with linear attention."""
    prefix, path = f"model.layers.{layer}.linear_attn", "layers/delta_net"
    number, keys = config.layers_with("delta_net").index(layer), sizes.keys
    ends = {"q": (0, keys), "k": (keys, 2 * keys), "v": (2 * keys, sizes.channels)}
    parts = {f"{path}/{name}": Rows(sizes.channels, *rows) for name, rows in ends.items()}
    names = fused(f"{prefix}.in_proj_qkv", parts, number, False)
    for ours, theirs in {"gate": "in_proj_z", "beta": "in_proj_b", "decay": "in_proj_a", "o": "out_proj"}.items():
        names |= linear(f"{prefix}.{theirs}", f"{path}/{ours}", number, False)
    vectors = {"dt_bias": "decay/bias", "A_log": "a_log", "norm.weight": "norm/scale", "conv1d.weight": "conv"}
    return names | {f"{prefix}.{name}": (Place(f"{path}/{ours}", (number,)),) for name, ours in vectors.items()}
