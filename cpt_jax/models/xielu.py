"""An activation that learns (Huang & Schlag 2024, arXiv 2411.13010)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cpt_jax.models.linear import Weight


class LearntActivation(nnx.Module):
    """xIELU: p x² + beta x above zero, n (eˣ - 1 - x) + beta x below, where p = softplus(alpha_p) and n = beta +
    softplus(alpha_n) are learnt; beta, and the number near zero above which eˣ - 1 is not looked at, are not."""

    def __init__(self) -> None:
        # softplus makes 0.8 of the one, and of the other 0.3, which with beta are 0.8.
        self.alpha_p = Weight(jnp.log(jnp.expm1(jnp.full((1,), 0.8))), logical_axes=("hidden",))
        self.alpha_n = Weight(jnp.log(jnp.expm1(jnp.full((1,), 0.3))), logical_axes=("hidden",))
        self.beta = Weight(jnp.asarray(0.5), logical_axes=())
        self.eps = Weight(jnp.asarray(-1e-6), logical_axes=())

    def __call__(self, x: Float[Array, "*rows i"]) -> Float[Array, "*rows i"]:
        numbers = (self.alpha_p, self.alpha_n, self.beta, self.eps)
        alpha_p, alpha_n, beta, eps = (each[...].astype(x.dtype).reshape((1,) * x.ndim) for each in numbers)
        above = jax.nn.softplus(alpha_p) * x * x
        below = (beta + jax.nn.softplus(alpha_n)) * (jnp.expm1(jnp.minimum(x, eps)) - x)
        return jnp.where(x > 0, above, below) + beta * x
