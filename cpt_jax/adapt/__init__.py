"""What trains. One answer a method, by path, decides the gradient, the optimizer's state, the EMA, the dtype and
what is saved."""

from cpt_jax.adapt.expand import Expand, expanded_hf_config, usual_blocks
from cpt_jax.adapt.methods import ByPath, Embeddings, Full, LoRA, Method

__all__ = ["ByPath", "Embeddings", "Expand", "Full", "LoRA", "Method", "expanded_hf_config", "usual_blocks"]
