"""Which keys a query sees, as a range: from a first one to the query's own place."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

UNLIMITED = 1 << 30
# The name by which a policy of rematerialisation keeps attention's result, and what its backward pass needs besides.
SAVED = "attention_out"


class Visible(NamedTuple):
    """Keys of the query's own document that are not later, and less than the layer's window before it.

    begins: the place where each query's document begins; None: each row is one document.
    kind: of the layer; the i-th kind has the i-th window.
    index: the place of the first query, where keys of earlier calls are in a cache.
    """

    begins: Int[Array, "B S"] | None
    kind: Int[Array, ""] | int = 0
    index: Int[Array, ""] | int = 0


def document_begins(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Where the document of each token begins. Documents lie in one piece: an id that comes again is another one."""
    places = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None], segment_ids.shape)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jax.lax.cummax(jnp.where(jnp.pad(changes, ((0, 0), (1, 0))), places, 0), axis=1)


def document_lengths(begins: Int[Array, "B S"], positions: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The length of each token's document: one more than its last token's position."""
    places = jnp.broadcast_to(jnp.arange(begins.shape[1], dtype=jnp.int32)[None], begins.shape)
    ends = jnp.pad(begins[:, 1:] != begins[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    last = jax.lax.cummin(jnp.where(ends, places, begins.shape[1]), axis=1, reverse=True)
    return jnp.take_along_axis(positions, last, axis=1) + 1


def first_visible(
    visible: Visible, windows: Sequence[int | None], batch: int, length: int
) -> tuple[Int[Array, "B S"], Int[Array, "1 S"]]:
    """(the first key that each query sees, the queries' own places)."""
    places = (visible.index + jnp.arange(length, dtype=jnp.int32))[None]
    begins = jnp.zeros((batch, length), jnp.int32) if visible.begins is None else visible.begins
    if all(window is None for window in windows):
        return begins, places
    window = jnp.asarray([UNLIMITED if each is None else each for each in windows], jnp.int32)[visible.kind]
    return jnp.maximum(begins, places - window + 1), places


def mask(first: Int[Array, "B S"], places: Int[Array, "1 S"], keys: Int[Array, "K"]) -> Bool[Array, "B S K"]:
    """True where a query sees a key."""
    return (keys[None, None] <= places[:, :, None]) & (keys[None, None] >= first[:, :, None])
