"""Hunyuan, dense (0.5B to 7B): queries and keys normalised head by head once they are rotated, by a theta that may be
stretched."""

from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import NORMS, Names, attention_biases, config_of, read, renamed, standard_names

MODEL_TYPES = ("hunyuan_v1_dense",)
RENAMED = {"self_attn.q_norm": "self_attn.query_layernorm", "self_attn.k_norm": "self_attn.key_layernorm"}


def config_from_hf(raw: dict) -> DecoderConfig:
    return config_of_read(read(raw, {}))


def config_of_read(hf: Any, **differences: Any) -> DecoderConfig:
    """Of a config as transformers reads it, with what is different in this family."""
    hf.rope_parameters = _stretched(hf.rope_parameters, hf.head_dim or hf.hidden_size // hf.num_attention_heads)
    return config_of(hf, qk_norm="rotated", **attention_biases(hf), **differences)


def _stretched(parameters: dict[str, Any], dim: int) -> dict[str, Any]:
    """What its makers call dynamic is the same for texts of all lengths where it has an `alpha`."""
    if parameters["rope_type"] != "dynamic" or not (alpha := parameters.get("alpha")):
        return parameters
    return {"rope_type": "default", "rope_theta": parameters["rope_theta"] * alpha ** (dim / (dim - 2))}


def weight_names(config: DecoderConfig) -> Names:
    return renamed(standard_names(config, NORMS), RENAMED)
