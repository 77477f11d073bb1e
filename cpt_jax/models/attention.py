"""Causal self-attention with grouped heads, within documents and within a window."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cpt_jax.models.linear import Linear, LoRAConfig, applied
from cpt_jax.models.norms import RMSNorm
from cpt_jax.models.products import contract
from cpt_jax.models.remat import recomputed
from cpt_jax.models.rope import Rotation, rotate


class Cache(NamedTuple):
    """Keys and values of the positions seen so far, of one layer (or of all, with a leading axis)."""

    keys: Float[Array, "B G K head"]
    values: Float[Array, "B G K head"]


def document_mask(segment_ids: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """True where a query may see a key: not later, and in the same document."""
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))[None]
    return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


def within_window(mask: Bool[Array, "B S K"], window: int | None, index: Int[Array, ""] | int) -> Bool[Array, "B S K"]:
    """The mask without keys `window` places or more before their query; the first query's place is `index`."""
    if window is None:
        return mask
    queries, keys = index + jnp.arange(mask.shape[1]), jnp.arange(mask.shape[2])
    return mask & (queries[:, None] - keys[None, :] < window)[None]


class Attention(nnx.Module):
    """Projections and heads; H query heads share G key/value heads (grouped-query: Ainslie et al. 2023, arXiv
    2305.13245)."""

    def __init__(self, config, lora: LoRAConfig | None, rngs: nnx.Rngs) -> None:
        self.heads, self.groups, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = config.attention_scale if config.attention_scale is not None else config.head_dim**-0.5
        self.softcap, self.normed = config.attention_softcap, config.qk_norm
        width, queries, keys = config.hidden_size, self.heads * self.head_dim, self.groups * self.head_dim
        qkv_bias, out_bias = config.qkv_bias, config.attention_out_bias
        self.q = Linear("q", ("embed", "heads"), (width, queries), lora, rngs, qkv_bias)
        self.k = Linear("k", ("embed", "heads"), (width, keys), lora, rngs, qkv_bias)
        self.v = Linear("v", ("embed", "heads"), (width, keys), lora, rngs, qkv_bias)
        self.o = Linear("o", ("heads", "embed"), (queries, width), lora, rngs, out_bias)
        if self.normed is not None:
            each = self.normed == "head"
            self.q_norm = RMSNorm(self.head_dim if each else queries, config.norm_epsilon, config.norm_offset)
            self.k_norm = RMSNorm(self.head_dim if each else keys, config.norm_epsilon, config.norm_offset)

    def _split(self, y: Float[Array, "B S x"]) -> Float[Array, "B heads S head"]:
        batch, length, _ = y.shape
        return y.reshape(batch, length, -1, self.head_dim).transpose(0, 2, 1, 3)

    def _projected(self, x: Float[Array, "B S D"], angles: Rotation, dtype: jnp.dtype):
        q, k, v = applied((self.q, self.k, self.v), x, dtype)
        if self.normed == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = self._split(q), self._split(k), self._split(v)
        if self.normed == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, angles) * self.scale, rotate(k, angles), v

    def __call__(
        self,
        x: Float[Array, "B S D"],
        angles: Rotation,
        mask: Bool[Array, "B S K"],
        dtype: jnp.dtype,
        cache: Cache | None = None,
        index: Int[Array, ""] | None = None,
        norm: Callable[[Array], Array] = lambda x: x,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        """Of the normalised input: what `norm` makes of x. Attends within `mask`; with a cache, this call's keys go into it at `index` and all of it is attended to."""
        batch, length, _ = x.shape
        q, k, v = recomputed(lambda x: self._projected(norm(x), angles, dtype))(x)
        if cache is not None:
            assert index is not None
            k = jax.lax.dynamic_update_slice_in_dim(cache.keys, k.astype(cache.keys.dtype), index, axis=2)
            v = jax.lax.dynamic_update_slice_in_dim(cache.values, v.astype(cache.values.dtype), index, axis=2)
            cache = Cache(k, v)
        # The heads of a group are rows of one product: no copies of its keys and values are made.
        q = q.reshape(batch, self.groups, self.heads // self.groups, length, self.head_dim)
        scores = contract("bgrsh,bgkh->bgrsk", q, k, dtype)
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
        mixed = contract("bgrsk,bgkh->bgrsh", jax.nn.softmax(scores, axis=-1), v, dtype)
        mixed = mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, self.heads * self.head_dim)
        return self.o(mixed, dtype), cache
