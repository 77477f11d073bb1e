"""Causal self-attention with grouped heads: projections, rotations, the cache. What is in between is `kernels`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cpt_jax.models.kernels.attend import attend
from cpt_jax.models.kernels.visible import Visible
from cpt_jax.models.linear import Linear, LoRAConfig, applied
from cpt_jax.models.norms import RMSNorm
from cpt_jax.models.remat import named, recomputed
from cpt_jax.models.rope import Rotation, rotate


class Cache(NamedTuple):
    """Keys and values of the positions seen so far, of one layer (or of all, with a leading axis)."""

    keys: Float[Array, "B G K head"]
    values: Float[Array, "B G K head"]


class Attention(nnx.Module):
    """Projections and heads; H query heads share G key/value heads (grouped-query: Ainslie et al. 2023, arXiv
    2305.13245)."""

    def __init__(self, config, lora: LoRAConfig | None, rngs: nnx.Rngs) -> None:
        self.heads, self.groups, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = config.attention_scale if config.attention_scale is not None else config.head_dim**-0.5
        self.softcap, self.normed = config.attention_softcap, config.qk_norm
        self.windows, self.kernel = tuple(kind.window for kind in config.layer_kinds), config.attention
        self.documents, self.runs, self.interleaved = config.documents, config.runs, config.interleaved_rotation
        width, queries, keys = config.hidden_size, self.heads * self.head_dim, self.groups * self.head_dim
        qkv_bias, out_bias = config.qkv_bias, config.attention_out_bias
        self.q = Linear("layers/attention/q", ("embed", "heads"), (width, queries), lora, rngs, qkv_bias)
        self.k = Linear("layers/attention/k", ("embed", "heads"), (width, keys), lora, rngs, qkv_bias)
        self.v = Linear("layers/attention/v", ("embed", "heads"), (width, keys), lora, rngs, qkv_bias)
        self.o = Linear("layers/attention/o", ("heads", "embed"), (queries, width), lora, rngs, out_bias)
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
        q, k = rotate(q, angles, self.interleaved) * self.scale, rotate(k, angles, self.interleaved)
        return (q if angles.queries is None else q * angles.queries[:, None, :, None]), k, v

    def __call__(
        self,
        x: Float[Array, "B S D"],
        angles: Rotation,
        visible: Visible,
        dtype: jnp.dtype,
        cache: Cache | None = None,
        norm: Callable[[Array], Array] = lambda x: x,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        """Of the normalised input: what `norm` makes of x. Attends to what is visible; with a cache, this call's keys
        go into it at the first query's place, all of it is attended to, and always by the reference."""
        batch, length, _ = x.shape
        q, k, v = recomputed(lambda x: self._projected(norm(x), angles, dtype))(x)
        q, k, v = named(q, "queries"), named(k, "keys"), named(v, "values")
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache.keys, k.astype(cache.keys.dtype), visible.index, axis=2)
            v = jax.lax.dynamic_update_slice_in_dim(cache.values, v.astype(cache.values.dtype), visible.index, axis=2)
            cache = Cache(k, v)
        mixed = attend(
            q,
            k,
            v,
            visible,
            windows=self.windows,
            softcap=self.softcap,
            dtype=dtype,
            kernel=self.kernel if cache is None else "xla",
            documents=self.documents,
            runs=self.runs,
        )
        mixed = mixed.transpose(0, 2, 1, 3).reshape(batch, length, self.heads * self.head_dim)
        return self.o(mixed, dtype), cache
