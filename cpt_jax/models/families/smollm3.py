"""SmolLM3: Llama whose every fourth layer does not rotate queries and keys, with a sliding window if asked for."""

from typing import Any

from cpt_jax.core.errors import UserError
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import NORMS, Names, attention_biases, config_of, read, standard_names

MODEL_TYPES = ("smollm3",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    if "sliding_attention" in hf.layer_types and not (hf.use_sliding_window and hf.sliding_window):
        # transformers masks by layer_types, flash attention by use_sliding_window as well.
        raise UserError(
            f"config.json has layer_types of kind 'sliding_attention' with use_sliding_window={hf.use_sliding_window} and "
            f"sliding_window={hf.sliding_window}: set both, or no such layers"
        )
    return config_of(hf, rotated=_rotated(hf), **attention_biases(hf), mlp_bias=bool(hf.mlp_bias))


def _rotated(hf: Any) -> list[bool]:
    """Of each layer; the list may be longer than there are layers."""
    if len(hf.no_rope_layers) < hf.num_hidden_layers:
        raise UserError(
            f"no_rope_layers names {len(hf.no_rope_layers)} layers, num_hidden_layers {hf.num_hidden_layers}"
        )
    return [bool(each) for each in hf.no_rope_layers]


def layer_fields(config: DecoderConfig) -> dict[str, Any]:
    """What a config.json says of its layers besides `layer_types`."""
    return {"no_rope_layers": [int(kind.rope is not None) for kind in config.kind_of_layer]}


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
