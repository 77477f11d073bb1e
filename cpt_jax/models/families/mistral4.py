"""Mistral Small 4's text model: DeepSeek V3's attention, whose queries grow with their position; experts chosen by a
softmax, in all but the first layers."""

import dataclasses
from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import ministral3, routed
from cpt_jax.models.families.deepseek_v3 import latent_attention
from cpt_jax.models.families.schema import Names, config_of, read

MODEL_TYPES = ("mistral4",)
STACKED = True


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    dense = hf.first_k_dense_replace >= hf.num_hidden_layers
    experts = routed.experts_of(hf, hf.n_routed_experts, hf.n_shared_experts)
    router = dataclasses.replace(experts.router, scores="softmax", correction_bias=False)
    config = config_of(
        hf,
        **latent_attention(hf),
        experts=None if dense else dataclasses.replace(experts, router=router),
        dense_layers=0 if dense else hf.first_k_dense_replace,
    )
    return ministral3.with_growth(config, hf)


def layer_fields(config: DecoderConfig) -> dict[str, Any]:
    """What a config.json says of its layers besides `layer_types`."""
    return {"first_k_dense_replace": config.num_layers if config.experts is None else config.dense_layers}


def weight_names(config: DecoderConfig) -> Names:
    return routed.weight_names(config)
