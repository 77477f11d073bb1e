"""Normalisation of hidden states."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cpt_jax.models.linear import Weight


def unit_rms(x: Float[Array, "*rows D"], epsilon: float) -> Float[Array, "*rows D"]:
    """x / rms(x), in x's own type."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale), in x's own type (Zhang & Sennrich 2019, arXiv 1910.07467); Gemma's scale is
    stored less an offset of 1. Of several `groups` of numbers each is divided by its own rms."""

    def __init__(self, width: int, epsilon: float, offset: float = 0.0, groups: int = 1) -> None:
        self.epsilon, self.offset, self.groups = epsilon, offset, groups
        self.scale = Weight(jnp.full((width,), 1.0 - offset), logical_axes=("hidden",))

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        of_groups = x if self.groups == 1 else x.reshape(*x.shape[:-1], self.groups, -1)
        return unit_rms(of_groups, self.epsilon).reshape(x.shape) * (self.offset + self.scale[...]).astype(
            x.dtype
        ).reshape((1,) * (x.ndim - 1) + (-1,))


class LayerNorm(nnx.Module):
    """(x - mean(x)) / deviation(x) * scale + bias, in x's own type (Ba et al. 2016, arXiv 1607.06450); Cohere's has no
    bias."""

    def __init__(self, width: int, epsilon: float, bias: bool = True) -> None:
        self.epsilon = epsilon
        self.scale = Weight(jnp.ones((width,)), logical_axes=("hidden",))
        self.bias = Weight(jnp.zeros((width,)), logical_axes=("hidden",)) if bias else None

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.epsilon)
        scaled = centred * inverse * self.scale[...].astype(x.dtype)[None, None, :]
        return scaled if self.bias is None else scaled + self.bias[...].astype(x.dtype)[None, None, :]


def norm(config) -> RMSNorm | LayerNorm:
    """The norm of hidden states that a DecoderConfig asks for."""
    if config.norm == "layer":
        return LayerNorm(config.hidden_size, config.norm_epsilon, config.norm_bias)
    return RMSNorm(config.hidden_size, config.norm_epsilon, config.norm_offset)
