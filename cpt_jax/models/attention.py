"""Causal self-attention with grouped heads: projections and rotations. What is in between is `kernels`."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cpt_jax.models.kernels.attend import attend
from cpt_jax.models.kernels.cached import KeyCache, cached
from cpt_jax.models.kernels.visible import Visible
from cpt_jax.models.linear import Linear, LoRAConfig, Weight, applied
from cpt_jax.models.norms import RMSNorm, unit_rms
from cpt_jax.models.remat import named, recomputed
from cpt_jax.models.rope import Rotation, rotate

# Keys and values of a layer, which others share.
Shared = tuple[Float[Array, "B G S head"], Float[Array, "B G S head"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalAttention:
    """The heads of layers that see all, where they have other sizes than those of windowed layers (Gemma 4). With
    `values_are_keys` values are what keys are before their norm and rotation."""

    name: ClassVar = "global_attention"
    layer_type: ClassVar = "full_attention"

    head_dim: int
    num_kv_heads: int
    values_are_keys: bool = False


class Attention(nnx.Module):
    """Projections and heads; H query heads share G key/value heads (grouped-query: Ainslie et al. 2023, arXiv
    2305.13245). Without `sizes` they are the config's. A layer in the stack "sharing" has queries alone."""

    def __init__(
        self,
        config,
        sizes: GlobalAttention | None,
        lora: LoRAConfig | None,
        rngs: nnx.Rngs,
        *,
        path: str,
        sharing: bool = False,
    ) -> None:
        self.heads, self.head_dim = config.num_heads, config.head_dim if sizes is None else sizes.head_dim
        self.scale = config.attention_scale if config.attention_scale is not None else self.head_dim**-0.5
        self.softcap, self.normed = config.attention_softcap, config.qk_norm
        self.value_epsilon = config.norm_epsilon if config.value_norm else None
        self.windows, self.kernel = tuple(kind.window for kind in config.layer_kinds), config.attention
        self.documents, self.runs, self.interleaved = config.documents, config.runs, config.interleaved_rotation
        queries = self.heads * self.head_dim
        keys = self.head_dim * (config.num_kv_heads if sizes is None else sizes.num_kv_heads)
        self.sharing, self.shared = sharing, config.sharing_layers > 0

        def linear(name: str, outputs: int, bias: bool = False) -> Linear:
            return Linear(f"{path}/{name}", ("embed", "heads"), (config.hidden_size, outputs), lora, rngs, bias)

        self.q = linear("q", queries, config.qkv_bias)
        self.k = None if sharing else linear("k", keys, config.qkv_bias)
        self.v = (
            None if sharing or (sizes is not None and sizes.values_are_keys) else linear("v", keys, config.qkv_bias)
        )
        self.o = Linear(
            f"{path}/o", ("heads", "embed"), (queries, config.hidden_size), lora, rngs, config.attention_out_bias
        )
        self.sinks = Weight(jnp.zeros((self.heads,)), logical_axes=("heads",)) if config.attention_sinks else None
        self.gated = config.attention_gate is not None
        if self.gated:
            self.gate = linear("gate", queries if config.attention_gate == "channel" else self.heads)
        if self.normed is not None:
            each = self.normed != "projection"
            self.q_norm = RMSNorm(self.head_dim if each else queries, config.norm_epsilon, config.norm_offset)
            if not sharing:
                self.k_norm = RMSNorm(self.head_dim if each else keys, config.norm_epsilon, config.norm_offset)

    def _split(self, y: Float[Array, "B S x"]) -> Float[Array, "B heads S head"]:
        batch, length, _ = y.shape
        return y.reshape(batch, length, -1, self.head_dim).transpose(0, 2, 1, 3)

    def _projected(self, x: Float[Array, "B S D"], angles: Rotation, dtype: jnp.dtype):
        """Queries, keys and values (unless they are another layer's), and what gates are made of."""
        keys, values = () if self.k is None else (self.k,), () if self.v is None else (self.v,)
        q, *others = applied((self.q, *keys, *values, *((self.gate,) if self.gated else ())), x, dtype)
        k, others = others[: len(keys)], others[len(keys) :]
        v, gate = others[: len(values)] or k, others[len(values) :]
        if self.normed == "projection":
            q, k = self.q_norm(q), [self.k_norm(y) for y in k]
        q, k, v = self._split(q), [self._split(y) for y in k], [self._split(y) for y in v]
        if self.normed == "head":
            q, k = self.q_norm(q), [self.k_norm(y) for y in k]
        if self.value_epsilon is not None:
            v = [unit_rms(y, self.value_epsilon) for y in v]
        q, k = rotate(q, angles, self.interleaved), [rotate(y, angles, self.interleaved) for y in k]
        if self.normed == "rotated":
            q, k = self.q_norm(q), [self.k_norm(y) for y in k]
        q = q * self.scale
        if angles.queries is not None:
            q = q * angles.queries[:, None, :, None]
        return [q], k, v, [y.astype(dtype) for y in gate]

    def __call__(
        self,
        x: Float[Array, "B S D"],
        angles: Rotation,
        visible: Visible,
        dtype: jnp.dtype,
        cache: KeyCache | Shared | None = None,
        norm: Callable[[Array], Array] = lambda x: x,
    ) -> tuple[Float[Array, "B S D"], KeyCache | Shared | None]:
        """Of the normalised input: what `norm` makes of x. Attends to what is visible; with a cache, this call's keys
        go into it at the first query's place. Where layers share keys and values, these are given back where there is no
        cache; a layer that has none is given them, or the other layer's cache, which it leaves as it is."""
        batch, length, _ = x.shape
        (q,), k, v, gate = recomputed(lambda x: self._projected(norm(x), angles, dtype))(x)
        q, sinks = named(q, "queries"), None if self.sinks is None else self.sinks[...]
        if not self.sharing:
            own = named(k[0], "keys"), named(v[0], "values")
            cache = cache.written(own, visible.index) if isinstance(cache, KeyCache) else own
        assert cache is not None
        if isinstance(cache, KeyCache):
            mixed = cached(q, cache, visible, self.windows, self.softcap, dtype, sinks)
        else:
            mixed = attend(
                q,
                *cache,
                visible,
                windows=self.windows,
                softcap=self.softcap,
                dtype=dtype,
                sinks=sinks,
                kernel=self.kernel,
                documents=self.documents,
                runs=self.runs,
            )
        mixed = mixed.transpose(0, 2, 1, 3)
        if gate:
            mixed = recomputed(self._gated)(mixed, gate[0])
        given_back = cache if isinstance(cache, KeyCache) or self.shared else None
        return self.o(mixed.reshape(batch, length, self.heads * self.head_dim), dtype), given_back

    def _gated(self, mixed: Float[Array, "B S H h"], gate: Float[Array, "B S x"]) -> Float[Array, "B S H h"]:
        """Output gates (Qiu et al. 2025, arXiv 2505.06708): of each number, or of each head."""
        return mixed * jax.nn.sigmoid(gate.astype(mixed.dtype)).reshape(*mixed.shape[:3], -1)
