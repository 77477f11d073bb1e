"""Qwen3.5, text: in three of four layers Gated DeltaNet in the place of attention; in the others Qwen3's attention with
gated heads, of which a quarter is turned by positions; norms' scales are stored less one."""

from collections.abc import Callable
from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.delta_net import DeltaNetConfig
from cpt_jax.models.families.schema import (
    MLP,
    NORMS,
    Names,
    Place,
    attention_names,
    config_of,
    consecutive,
    experts_names,
    fused,
    linear,
    mlp_names,
    norm_names,
    outer_names,
    read,
)

MODEL_TYPES = ("qwen3_5_text",)
# What predicts several tokens, which transformers does not read.
BESIDE = ("mtp.",)
# The convolution's activation too is `hidden_act`.
UNSUPPORTED = {"attention_bias": (False,), "attn_output_gate": (True,), "hidden_act": ("silu", "swish")}
# Linear attention's projections of a layer: of their tensors' prefix, our path, the number there, and the sizes.
Projections = Callable[[str, str, int, DeltaNetConfig], Names]


def config_from_hf(raw: dict) -> DecoderConfig:
    return hybrid(read(raw, UNSUPPORTED))


def hybrid(hf: Any, **differences: Any) -> DecoderConfig:
    """Of a config as transformers reads it, with what is different in this family."""
    mixers = {"linear_attention": delta_net(hf)}
    return config_of(hf, mixers=mixers, norm_offset=1.0, qk_norm="head", attention_gate="channel", **differences)


def delta_net(hf: Any) -> DeltaNetConfig:
    return DeltaNetConfig(
        key_heads=hf.linear_num_key_heads,
        value_heads=hf.linear_num_value_heads,
        key_dim=hf.linear_key_head_dim,
        value_dim=hf.linear_value_head_dim,
        kernel_size=hf.linear_conv_kernel_dim,
    )


def weight_names(config: DecoderConfig) -> Names:
    return hybrid_names(config, _projections)


def hybrid_names(config: DecoderConfig, projections: Projections) -> Names:
    names = outer_names(config)
    for layer, kind in enumerate(config.kind_of_layer):
        if isinstance(kind.mixer, DeltaNetConfig):
            names |= _delta_net_names(config, layer, kind.mixer, projections)
        else:
            names |= attention_names(config, layer)
        fed = mlp_names(config, layer, MLP) if config.experts is None else experts_names(config, layer, "mlp", MLP)
        names |= fed | norm_names(config, layer, NORMS)
    return names


def _delta_net_names(config: DecoderConfig, layer: int, sizes: DeltaNetConfig, projections: Projections) -> Names:
    prefix, path = f"model.layers.{layer}.linear_attn", "layers/delta_net"
    number = config.layers_with("delta_net").index(layer)
    names = projections(prefix, path, number, sizes) | linear(f"{prefix}.out_proj", f"{path}/o", number, False)
    vectors = {"dt_bias": "decay/bias", "A_log": "a_log", "norm.weight": "norm/scale", "conv1d.weight": "conv"}
    return names | {f"{prefix}.{name}": (Place(f"{path}/{ours}", (number,)),) for name, ours in vectors.items()}


def _projections(prefix: str, path: str, number: int, sizes: DeltaNetConfig) -> Names:
    parts = consecutive({f"{path}/q": sizes.keys, f"{path}/k": sizes.keys, f"{path}/v": sizes.values})
    names = fused(f"{prefix}.in_proj_qkv", parts, number, False)
    for ours, theirs in {"gate": "in_proj_z", "beta": "in_proj_b", "decay": "in_proj_a"}.items():
        names |= linear(f"{prefix}.{theirs}", f"{path}/{ours}", number, False)
    return names
