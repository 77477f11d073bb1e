"""What trains. One answer a method, by path, decides the gradient, the optimizer's state, the EMA, the dtype and
what is saved."""

from cpt_jax.adapt.methods import Embeddings, Full, LoRA, Method

__all__ = ["Embeddings", "Full", "LoRA", "Method"]
