"""Attention as the formula says: all scores at once. What the kernels are compared with."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cpt_jax.models.kernels.visible import Visible, first_visible, mask
from cpt_jax.models.products import contract


def reference(
    q: Float[Array, "B H S h"],
    k: Float[Array, "B G K h"],
    v: Float[Array, "B G K h"],
    visible: Visible,
    windows: Sequence[int | None],
    softcap: float | None,
    dtype: jnp.dtype,
) -> Float[Array, "B H S h"]:
    """softmax(q k) v over the keys that are visible; the one way that reads a cache."""
    batch, heads, length, head_dim = q.shape
    # The heads of a group are rows of one product: no copies of its keys and values are made.
    q = q.reshape(batch, k.shape[1], heads // k.shape[1], length, head_dim)
    scores = contract("bgrsh,bgkh->bgrsk", q, k, dtype)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = mask(*first_visible(visible, windows, batch, length), jnp.arange(k.shape[2]))
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(scores.dtype).min)
    mixed = contract("bgrsk,bgkh->bgrsh", jax.nn.softmax(scores, axis=-1), v, dtype)
    return mixed.reshape(batch, heads, length, head_dim)
