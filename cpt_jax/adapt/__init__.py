"""What trains: one answer a method, by path, decides the gradient, the optimizer's state, the EMA, the dtype and what is
saved. And how long a text the model reads."""

from cpt_jax.adapt.context import POSITIONS, Context, Linear, Positions, Theta, Yarn
from cpt_jax.adapt.expand import Expand, expanded_hf_config, usual_blocks
from cpt_jax.adapt.methods import ByPath, Embeddings, Full, LoRA, Method

__all__ = [
    "POSITIONS",
    "ByPath",
    "Context",
    "Embeddings",
    "Expand",
    "Full",
    "Linear",
    "LoRA",
    "Method",
    "Positions",
    "Theta",
    "Yarn",
    "expanded_hf_config",
    "usual_blocks",
]
