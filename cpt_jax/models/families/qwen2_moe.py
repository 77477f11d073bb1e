"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 whose feed-forward is that of a few experts, chosen by a router, and of one that every
token goes through."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import MLP, Names, config_of, experts_of, mixture_names, read

MODEL_TYPES = ("qwen2_moe",)
UNSUPPORTED = {"decoder_sparse_step": (1,), "mlp_only_layers": (None, [])}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    return config_of(hf, experts=experts_of(hf), intermediate_size=hf.moe_intermediate_size, qkv_bias=bool(hf.qkv_bias))


def weight_names(config: DecoderConfig) -> Names:
    return mixture_names(config, "mlp", MLP)
