"""Attention to keys of earlier calls, which a cache holds: block by block, as far as the text has come."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cpt_jax.models.kernels.visible import Visible, first_visible, mask
from cpt_jax.models.products import contract, sum_type
from cpt_jax.sharding.hardware import backend

# A token of SmolLM2's 30 layers in 32 rows of up to 576 tokens, on two CPU cores: attention takes 98 ms with blocks of 64
# where 501 tokens are there, 107 with 96, 171 with 192; where 101 are, 26, 51 and 88. An accelerator wants fewer steps.
CPU_BLOCK, BLOCK = 64, 512


class KeyCache(NamedTuple):
    """What keys and values are made of, of all layers that have a cache of this kind, and the number of the layer that
    is meant, if one is. The last of `parts` are the values."""

    parts: tuple[Float[Array, "L B G K w"], ...]
    layer: Any = None

    @classmethod
    def empty(cls, layers: int, batch: int, groups: int, length: int, widths: Sequence[int], dtype) -> "KeyCache":
        """Of layers that have seen nothing, with room for rows of `length` tokens."""
        return cls(tuple(jnp.zeros((layers, batch, groups, length, width), dtype) for width in widths))

    def written(self, new: Sequence[Float[Array, "B G S w"]], index: Int[Array, ""] | int) -> "KeyCache":
        """With the layer's of these tokens in the places from `index` on."""
        put = jax.lax.dynamic_update_slice
        at = (self.layer, 0, 0, index, 0)
        parts = (put(old, part[None].astype(old.dtype), at) for old, part in zip(self.parts, new, strict=True))
        return self._replace(parts=tuple(parts))

    def read(self, start: Int[Array, ""], size: int) -> list[Float[Array, "B G size w"]]:
        """The layer's of so many places from `start` on."""

        def cut(part: Array) -> Array:
            _, *rows, _, width = part.shape
            return jax.lax.dynamic_slice(part, (self.layer, 0, 0, start, 0), (1, *rows, size, width))[0]

        return [cut(part) for part in self.parts]


def cached(
    q: Float[Array, "B H S h"],
    cache: KeyCache,
    visible: Visible,
    windows: Sequence[int | None],
    softcap: float | None,
    dtype: jnp.dtype,
    sinks: Float[Array, "H"] | None = None,
    keys: Callable[[Sequence[Array]], Array] = lambda parts: parts[0],
) -> Float[Array, "B H S v"]:
    """As `reference`, of keys and values in a cache which has those of this call too; `keys` makes them of its parts.

    A loop over blocks from the first that a query sees to that of the last query, with sums that are scaled as larger
    scores come (Milakov & Gimelshein 2018, arXiv 1805.02867): the cache is read where it lies, and only where it is full.
    """
    batch, heads, length, head_dim = q.shape
    _, _, groups, room, width = cache.parts[-1].shape
    size, wide = min(room, CPU_BLOCK if backend() == "cpu" else BLOCK), sum_type(dtype)
    # The heads of a group are rows of one product: no copies of its keys and values are made.
    q = q.reshape(batch, groups, heads // groups, length, head_dim)
    first, places = first_visible(visible, windows, batch, length)

    def step(number: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, mixed = sums
        # The last block reaches back into the one before where the room is not of whole blocks.
        start = jnp.minimum(number * size, room - size)
        parts, at = cache.read(start, size), start + jnp.arange(size)
        scores = contract("bgrsh,bgkh->bgrsk", q, keys(parts), dtype)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        seen = mask(jnp.maximum(first, number * size), places, at)
        scores = jnp.where(seen[:, None, None], scores, jnp.finfo(wide).min)
        new = jnp.maximum(largest, scores.max(-1, keepdims=True))
        weights, kept = jnp.exp(scores - new), jnp.exp(largest - new)
        added = contract("bgrsk,bgkv->bgrsv", weights, parts[-1], dtype)
        return new, total * kept + weights.sum(-1, keepdims=True), mixed * kept + added

    largest, total = jnp.full((*q.shape[:-1], 1), jnp.finfo(wide).min, wide), jnp.zeros((*q.shape[:-1], 1), wide)
    if sinks is not None:
        largest = jnp.broadcast_to(sinks.astype(wide).reshape(1, groups, -1, 1, 1), largest.shape)
        total = jnp.ones_like(total)
    sums = largest, total, jnp.zeros((*q.shape[:-1], width), wide)
    if size == room:
        # A GPU's loop whose length is not known waits for the host at each turn.
        _, total, mixed = step(jnp.int32(0), sums)
    else:
        _, total, mixed = jax.lax.fori_loop(jnp.min(first) // size, places[0, -1] // size + 1, step, sums)
    return (mixed / total).reshape(batch, heads, length, width)
