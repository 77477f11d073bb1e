"""Causal self-attention with grouped heads and rotary positions, within documents."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cpt_jax.models.linear import Linear, LoRAConfig
from cpt_jax.models.products import contract


class Rotation(NamedTuple):
    """Cosines and sines of the rotary angles, computed once for all layers."""

    cosine: Float[Array, "B S half"]
    sine: Float[Array, "B S half"]


class Cache(NamedTuple):
    """Keys and values of the positions seen so far, of one layer (or of all, with a leading axis)."""

    keys: Float[Array, "B G K head"]
    values: Float[Array, "B G K head"]


def rotation(positions: Int[Array, "B S"], head_dim: int, theta: float) -> Rotation:
    """Rotary angles (Su et al. 2021, arXiv 2104.09864)."""
    # In NumPy, rounded where transformers rounds: XLA's power is some units in the last place off, and positions
    # multiply that.
    frequencies = np.float32(1) / np.float32(theta) ** (
        np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    )
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B heads S head"], angles: Rotation) -> Float[Array, "B heads S head"]:
    """Rotates halves against each other, as the released checkpoints of this family expect (not neighbouring pairs)."""
    first, second = jnp.split(x, 2, axis=-1)
    cosine, sine = angles.cosine[:, None], angles.sine[:, None]
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def document_mask(segment_ids: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """True where a query may see a key: not later, and in the same document."""
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))[None]
    return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


class Attention(nnx.Module):
    """Projections and heads; H query heads share G key/value heads (grouped-query: Ainslie et al. 2023, arXiv
    2305.13245)."""

    def __init__(self, config, lora: LoRAConfig | None, rngs: nnx.Rngs) -> None:
        self.heads, self.groups, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        width, queries, keys = config.hidden_size, self.heads * self.head_dim, self.groups * self.head_dim
        self.q = Linear("q", ("embed", "heads"), (width, queries), lora, rngs)
        self.k = Linear("k", ("embed", "heads"), (width, keys), lora, rngs)
        self.v = Linear("v", ("embed", "heads"), (width, keys), lora, rngs)
        self.o = Linear("o", ("heads", "embed"), (queries, width), lora, rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        angles: Rotation,
        mask: Bool[Array, "B S K"],
        dtype: jnp.dtype,
        cache: Cache | None = None,
        index: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        """Attends within `mask`; with a cache, this call's keys go into it at `index` and all of it is attended to."""
        batch, length, _ = x.shape

        def split(y: Float[Array, "B S x"]) -> Float[Array, "B heads S head"]:
            return y.reshape(batch, length, -1, self.head_dim).transpose(0, 2, 1, 3)

        q = rotate(split(self.q(x, dtype)), angles) * self.head_dim**-0.5
        k, v = rotate(split(self.k(x, dtype)), angles), split(self.v(x, dtype))
        if cache is not None:
            assert index is not None
            k = jax.lax.dynamic_update_slice_in_dim(cache.keys, k, index, axis=2)
            v = jax.lax.dynamic_update_slice_in_dim(cache.values, v, index, axis=2)
            cache = Cache(k, v)
        # The heads of a group are rows of one product: no copies of its keys and values are made.
        q = q.reshape(batch, self.groups, self.heads // self.groups, length, self.head_dim)
        scores = contract("bgrsh,bgkh->bgrsk", q, k, dtype)
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
        mixed = contract("bgrsk,bgkh->bgrsh", jax.nn.softmax(scores, axis=-1), v, dtype)
        mixed = mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, self.heads * self.head_dim)
        return self.o(mixed, dtype), cache
