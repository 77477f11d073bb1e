"""Phi-3 and 3.5, Phi-4: Llama with projections stored in one tensor, a window, partial rotation and LongRoPE."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import (
    NORMS,
    Names,
    Rows,
    config_of,
    fused,
    fused_mlp_names,
    linear,
    norm_names,
    outer_names,
    read,
)

MODEL_TYPES = ("phi3",)


def config_from_hf(raw: dict) -> DecoderConfig:
    return config_of(read(raw, {}))


def weight_names(config: DecoderConfig) -> Names:
    names = outer_names(config)
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    whole = queries + 2 * keys
    qkv = {
        "layers/attention/q": Rows(whole, 0, queries),
        "layers/attention/k": Rows(whole, queries, queries + keys),
        "layers/attention/v": Rows(whole, queries + keys, whole),
    }
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        names |= fused(f"{prefix}.self_attn.qkv_proj", qkv, layer, False)
        names |= linear(f"{prefix}.self_attn.o_proj", "layers/attention/o", layer, False)
        names |= fused_mlp_names(config, layer) | norm_names(config, layer, NORMS)
    return names
