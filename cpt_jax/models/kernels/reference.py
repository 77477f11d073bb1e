"""Attention as the formula says: all scores at once. What the kernels are compared with."""

import functools
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cpt_jax.models.kernels.visible import Visible, first_visible, mask
from cpt_jax.models.products import contract, precision_of, sum_type


def reference(
    q: Float[Array, "B H S h"],
    k: Float[Array, "B G K h"],
    v: Float[Array, "B G K v"],
    visible: Visible,
    windows: Sequence[int | None],
    softcap: float | None,
    dtype: jnp.dtype,
    sinks: Float[Array, "B H"] | None = None,
) -> Float[Array, "B H S v"]:
    """softmax(q k) v over the keys that are visible."""
    batch, heads, length, head_dim = q.shape
    # The heads of a group are rows of one product: no copies of its keys and values are made.
    q = q.reshape(batch, k.shape[1], heads // k.shape[1], length, head_dim)
    scores = contract("bgrsh,bgkh->bgrsk", q, k, dtype)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = mask(*first_visible(visible, windows, batch, length), jnp.arange(k.shape[2]))
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(scores.dtype).min)
    if sinks is not None:
        sinks = sinks.reshape(*q.shape[:3], 1, 1)
    mixed = cast(Array, _mixed(scores, v, sinks, dtype))
    return mixed.reshape(batch, heads, length, v.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mixed(scores, v, sinks, dtype):
    """softmax(scores) v. Of the softmax only the rounded weights are kept, which the product takes anyway; JAX's own
    gradient would keep three times as much."""
    return _mixed_forward(scores, v, sinks, dtype)[0]


def _mixed_forward(scores, v, sinks, dtype):
    if sinks is None:
        weights, left = jax.nn.softmax(scores, axis=-1), None
    else:
        largest = jnp.maximum(scores.max(-1, keepdims=True), sinks)
        weights, left = jnp.exp(scores - largest), jnp.exp(sinks - largest)
        total = weights.sum(-1, keepdims=True) + left
        weights, left = weights / total, left / total
    weights, v = weights.astype(dtype), v.astype(dtype)
    return jnp.einsum(
        "bgrsk,bgkh->bgrsh", weights, v, preferred_element_type=sum_type(dtype), precision=precision_of(dtype)
    ), (weights, v, left)


def _mixed_backward(dtype, residuals, cotangent):
    weights, v, left = residuals
    low, wide = cotangent.astype(dtype), sum_type(dtype)
    dweights = jnp.einsum("bgrsh,bgkh->bgrsk", low, v, preferred_element_type=wide, precision=precision_of(dtype))
    dv = jnp.einsum("bgrsk,bgrsh->bgkh", weights, low, preferred_element_type=wide, precision=precision_of(dtype))
    scaled = weights.astype(wide) * dweights
    delta = scaled.sum(-1, keepdims=True)
    dsinks = None if left is None else -(left * delta).sum(-2, keepdims=True)
    return scaled - weights * delta, dv, dsinks


_mixed.defvjp(_mixed_forward, _mixed_backward)
