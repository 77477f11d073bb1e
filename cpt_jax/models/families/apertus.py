"""Apertus: Llama with queries and keys normalised head by head, and no gate, but an activation that learns."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import (
    Names,
    Place,
    attention_biases,
    attention_names,
    config_of,
    mlp_names,
    norm_names,
    outer_names,
    read,
)
from cpt_jax.models.linear import XIELU

MODEL_TYPES = ("apertus",)
NORMS = {"attention_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"}
_MLP = {"up": "up_proj", "down": "down_proj"}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    return config_of(hf, qk_norm="head", gated=False, **attention_biases(hf))


def weight_names(config: DecoderConfig) -> Names:
    names = outer_names(config)
    for layer in range(config.num_layers):
        names |= attention_names(config, layer) | mlp_names(config, layer, _MLP) | norm_names(config, layer, NORMS)
        if config.activation == XIELU:
            numbers, prefix = ("alpha_p", "alpha_n", "beta", "eps"), f"model.layers.{layer}.mlp.act_fn"
            names |= {f"{prefix}.{name}": (Place(f"layers/mlp/xielu/{name}", (layer,)),) for name in numbers}
    return names
