"""Multi-head latent attention (DeepSeek-V2: DeepSeek-AI 2024, arXiv 2405.04434): keys and values of all heads are made of
one short vector a token, which is all that a cache holds of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cpt_jax.models.kernels.attend import attend
from cpt_jax.models.kernels.cached import KeyCache, cached
from cpt_jax.models.kernels.visible import Visible
from cpt_jax.models.linear import Linear, LoRAConfig, applied
from cpt_jax.models.norms import RMSNorm
from cpt_jax.models.products import contract
from cpt_jax.models.remat import named, recomputed
from cpt_jax.models.rope import Rotation, rotate

# Of the norms of latents, whatever config.json says (transformers, modeling_deepseek_v3.py).
NORM_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig:
    """Widths of the latents that queries (None: they have none) and keys with values come from, and of each head: what
    of its queries and keys does not turn by position, what turns, and its values."""

    name: ClassVar = "latent_attention"
    layer_type: ClassVar = "full_attention"

    query_rank: int | None
    rank: int
    fixed_dim: int
    rotated_dim: int
    value_dim: int

    @property
    def head_dim(self) -> int:
        """Of queries and keys."""
        return self.fixed_dim + self.rotated_dim

    def empty_cache(self, layers: int, batch: int, length: int, dtype: jnp.dtype) -> KeyCache:
        """Of the rotated part of keys, and of latents."""
        return KeyCache.empty(layers, batch, 1, length, (self.rotated_dim, self.rank), dtype)


class LatentAttention(nnx.Module):
    """Heads whose keys and values are kv_b(norm(latent)), a part of keys apart, which turns and is that of all heads;
    latent and that part are kv_a(x). Queries are q_b(norm(q_a(x))), or q(x)."""

    def __init__(
        self, config, sizes: LatentAttentionConfig, lora: LoRAConfig | None, rngs: nnx.Rngs, *, path: str
    ) -> None:
        self.sizes, self.heads, width = sizes, config.num_heads, config.hidden_size
        self.scale = config.attention_scale if config.attention_scale is not None else sizes.head_dim**-0.5
        self.windows, self.kernel = tuple(kind.window for kind in config.layer_kinds), config.attention
        self.softcap, self.documents, self.runs = config.attention_softcap, config.documents, config.runs
        self.interleaved = config.interleaved_rotation

        def linear(name: str, inputs: int, outputs: int, bias: bool = False) -> Linear:
            # Latents are whole on each device, heads are cut.
            axes = ("heads", "embed") if name == "o" else ("embed", "hidden" if name.endswith("_a") else "heads")
            return Linear(f"{path}/{name}", axes, (inputs, outputs), lora, rngs, bias)

        queries = self.heads * sizes.head_dim
        if sizes.query_rank is None:
            self.q = linear("q", width, queries)
        else:
            self.q_a = linear("q_a", width, sizes.query_rank, config.qkv_bias)
            self.q_a_norm = RMSNorm(sizes.query_rank, NORM_EPSILON)
            self.q_b = linear("q_b", sizes.query_rank, queries)
        self.kv_a = linear("kv_a", width, sizes.rank + sizes.rotated_dim, config.qkv_bias)
        self.kv_a_norm = RMSNorm(sizes.rank, NORM_EPSILON)
        self.kv_b = linear("kv_b", sizes.rank, self.heads * (sizes.fixed_dim + sizes.value_dim))
        self.o = linear("o", self.heads * sizes.value_dim, width, config.attention_out_bias)

    def _split(self, y: Float[Array, "B S x"]) -> tuple[Array, Array]:
        """[B, H, S, h]: what does not turn, and what is behind it in each head."""
        heads = y.reshape(*y.shape[:2], self.heads, -1).transpose(0, 2, 1, 3)
        return heads[..., : self.sizes.fixed_dim], heads[..., self.sizes.fixed_dim :]

    def _projected(self, x: Float[Array, "B S D"], angles: Rotation, dtype: jnp.dtype) -> list[Array]:
        """Queries' two parts, latents, and the keys' part that turns."""
        first = self.q if self.sizes.query_rank is None else self.q_a
        q, kv = applied((first, self.kv_a), x, dtype)
        if self.sizes.query_rank is not None:
            q = self.q_b(self.q_a_norm(q), dtype)
        fixed, turning = self._split(q)
        latents, keys = kv[..., : self.sizes.rank], kv[:, None, :, self.sizes.rank :]
        growth = self.scale if angles.queries is None else self.scale * angles.queries[:, None, :, None]
        turned = rotate(turning, angles, self.interleaved)
        return [fixed * growth, turned * growth, self.kv_a_norm(latents), rotate(keys, angles, self.interleaved)]

    def _expanded(self, x: Float[Array, "B S D"], angles: Rotation, dtype: jnp.dtype) -> list[Array]:
        """Queries, keys and values."""
        fixed, turned, latents, key = self._projected(x, angles, dtype)
        keys, values = self._split(self.kv_b(latents, dtype))
        of_all = jnp.broadcast_to(key, (*keys.shape[:-1], self.sizes.rotated_dim))
        return [jnp.concatenate([fixed, turned], -1), jnp.concatenate([keys, of_all], -1), values]

    def __call__(
        self,
        x: Float[Array, "B S D"],
        angles: Rotation,
        visible: Visible,
        dtype: jnp.dtype,
        cache: KeyCache | None = None,
        norm: Callable[[Array], Array] = lambda x: x,
    ) -> tuple[Float[Array, "B S D"], KeyCache | None]:
        """Of the normalised input: what `norm` makes of x. As `Attention`; with a cache, latents are read as they are:
        the matrix that would make keys of them is multiplied with the queries, that of values with what is mixed."""
        if cache is None:
            q, k, v = recomputed(lambda x: self._expanded(norm(x), angles, dtype))(x)
            mixed = attend(
                named(q, "queries"),
                named(k, "keys"),
                named(v, "values"),
                visible,
                windows=self.windows,
                softcap=self.softcap,
                dtype=dtype,
                kernel=self.kernel,
                documents=self.documents,
                runs=self.runs,
            )
        else:
            fixed, turned, latents, key = self._projected(norm(x), angles, dtype)
            cache = cache.written((key, latents[:, None]), visible.index)
            matrix = self.kv_b.matrix(dtype).reshape(self.sizes.rank, self.heads, -1)
            down, up = jnp.split(matrix, [self.sizes.fixed_dim], axis=-1)
            q = jnp.concatenate([turned, contract("bhsn,rhn->bhsr", fixed, down, dtype)], -1)
            whole = functools.partial(jnp.concatenate, axis=-1)
            mixed = cached(q, cache, visible, self.windows, self.softcap, dtype, keys=whole)
            mixed = contract("bhsr,rhv->bhsv", mixed, up, dtype)
        return self.o(mixed.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1), dtype), cache
