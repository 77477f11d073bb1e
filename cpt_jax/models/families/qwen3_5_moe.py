"""Qwen3.5, text, with experts in the place of each feed-forward, whose weights always sum to 1."""

import dataclasses

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import qwen3_5
from cpt_jax.models.families.schema import experts_of, read

MODEL_TYPES = ("qwen3_5_moe_text",)
BESIDE = qwen3_5.BESIDE
weight_names = qwen3_5.weight_names


def config_from_hf(raw: dict) -> DecoderConfig:
    # No layer has a feed-forward of its own, and a config.json need not say how wide it would be.
    hf = read({"intermediate_size": 0} | raw, qwen3_5.UNSUPPORTED)
    experts = dataclasses.replace(experts_of(hf), renormalise=True)
    return qwen3_5.hybrid(hf, experts=experts, intermediate_size=hf.moe_intermediate_size)
