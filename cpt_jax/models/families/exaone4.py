"""EXAONE 4: norms behind attention and feed-forward, queries and keys normalised head by head; where some layers see a
window, the others do not rotate."""

from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import olmo2
from cpt_jax.models.families.schema import Names, config_of, read, standard_names

MODEL_TYPES = ("exaone4",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    return config_of(hf, rotated=rotated(hf), norm_placement="after", qk_norm="head")


def rotated(hf: Any) -> list[bool]:
    """Of each layer, as transformers has it: a model without windows has no sliding_window, and rotates everywhere."""
    return [hf.sliding_window is None or kind == "sliding_attention" for kind in hf.layer_types]


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, olmo2.NORMS)
