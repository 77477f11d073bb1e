"""Gated DeltaNet, linear attention by the gated delta rule (Yang et al. 2024, arXiv 2412.06464), as Qwen3-Next and
Qwen3.5 have it in three of four layers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cpt_jax.core.errors import UserError
from cpt_jax.models.causal_conv import causal_conv
from cpt_jax.models.delta_rule import State, gated_delta_rule
from cpt_jax.models.kernels.visible import SAVED, Visible
from cpt_jax.models.linear import Linear, LoRAConfig, Weight, applied
from cpt_jax.models.norms import RMSNorm
from cpt_jax.models.products import sum_type
from cpt_jax.models.remat import named, recomputed
from cpt_jax.models.rope import Rotation
from cpt_jax.sharding.hardware import backend


class DeltaNetCache(NamedTuple):
    """The convolution's last inputs, and the state (of all layers, with a leading axis)."""

    inputs: Float[Array, "B before C"]
    state: State


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNetConfig:
    """`value_heads` of width `value_dim` share `key_heads` of width `key_dim`; queries, keys and values pass through a
    convolution over `kernel_size` tokens."""

    name: ClassVar = "delta_net"
    layer_type: ClassVar = "linear_attention"

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel_size: int

    def __post_init__(self) -> None:
        if self.value_heads % self.key_heads:
            raise UserError(
                f"linear_num_value_heads {self.value_heads} is no multiple of linear_num_key_heads {self.key_heads}"
            )

    @property
    def keys(self) -> int:
        """Numbers of a token's keys, and of its queries."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """That pass through the convolution."""
        return 2 * self.keys + self.values

    def empty_cache(self, width: int, layers: int, batch: int, dtype: jnp.dtype) -> DeltaNetCache:
        """Of layers that have seen nothing."""
        heads = (self.key_heads, self.value_heads // self.key_heads)
        state = (layers, batch, *heads, self.key_dim, self.value_dim)
        inputs = (layers, batch, self.kernel_size - 1, self.channels)
        return DeltaNetCache(jnp.zeros(inputs, dtype), jnp.zeros(state, sum_type(dtype)))


class DeltaNet(nnx.Module):
    """o(norm(rule(q, k, v)) * silu(gate(x))), where q, k, v are projections behind the convolution and SiLU, q and k of
    length one; a token's decay is exp(-exp(a_log) softplus(decay(x))), its beta sigmoid(beta(x))."""

    def __init__(self, config, sizes: DeltaNetConfig, lora: LoRAConfig | None, rngs: nnx.Rngs, *, path: str) -> None:
        self.sizes = sizes
        # As in `FeedForward`.
        self.apart = config.layer_loop == "unroll" and config.remat is None
        width, heads = config.hidden_size, sizes.value_heads

        def linear(name: str, outputs: int, bias: bool = False) -> Linear:
            return Linear(f"{path}/{name}", ("embed", "heads"), (width, outputs), lora, rngs, bias)

        self.q, self.k, self.v = linear("q", sizes.keys), linear("k", sizes.keys), linear("v", sizes.values)
        self.gate = linear("gate", sizes.values)
        self.beta, self.decay = linear("beta", heads), linear("decay", heads, bias=True)
        self.o = Linear(f"{path}/o", ("heads", "embed"), (sizes.values, width), lora, rngs)
        self.conv = Weight(
            jax.random.normal(rngs.params(), (sizes.channels, 1, sizes.kernel_size)) * sizes.kernel_size**-0.5,
            logical_axes=("hidden", "hidden", "hidden"),
        )
        # Mamba 2's beginning: exp(a_log) between 1 and 16.
        rates = jax.random.uniform(rngs.params(), (heads,), minval=1.0, maxval=16.0)
        self.a_log = Weight(jnp.log(rates), logical_axes=("hidden",))
        self.norm = RMSNorm(sizes.value_dim, config.norm_epsilon)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        angles: Rotation,
        visible: Visible,
        dtype: jnp.dtype,
        cache: DeltaNetCache | None = None,
        norm: Callable[[Array], Array] = lambda x: x,
    ) -> tuple[Float[Array, "B S D"], DeltaNetCache | None]:
        """Of the normalised input: what `norm` makes of x. Positions are not told apart but by order."""
        linears = (self.beta, self.decay, self.q, self.k, self.v, self.gate)

        def projected(x: Array) -> list[Array]:
            beta, decay, *rest = applied(linears, norm(x), dtype)
            # What is kept for the backward pass is kept rounded, as autocast does.
            return [beta, decay, *(y.astype(dtype) for y in rest)]

        beta, decay, q, k, v, gate = recomputed(projected)(x)
        mix = functools.partial(self._mixed, visible=visible, dtype=dtype, cache=cache)
        mixed, new = recomputed(mix, apart=self.apart)(q, k, v, beta, decay)
        mixed = named(mixed.astype(dtype), SAVED)
        gated = recomputed(functools.partial(self._gated, dtype=dtype))(mixed, gate)
        return self.o(gated, dtype), None if cache is None else new

    def _mixed(
        self, q, k, v, beta, decay, *, visible: Visible, dtype: jnp.dtype, cache: DeltaNetCache | None
    ) -> tuple[Float[Array, "B S x"], DeltaNetCache]:
        sizes, (batch, length, _), wide = self.sizes, q.shape, sum_type(dtype)
        kernels = jnp.split(self.conv[...], (sizes.keys, 2 * sizes.keys))
        before = (None,) * 3 if cache is None else jnp.split(cache.inputs, (sizes.keys, 2 * sizes.keys), axis=-1)
        convolved = [
            causal_conv(y.astype(wide), kernel, visible, state)
            for y, kernel, state in zip((q, k, v), kernels, before, strict=True)
        ]
        q, k, v = (jax.nn.silu(y) for y, _ in convolved)
        heads = (batch, length, sizes.key_heads)
        q = _of_length_one(q.reshape(*heads, sizes.key_dim)) * sizes.key_dim**-0.5
        k = _of_length_one(k.reshape(*heads, sizes.key_dim))
        log_decay = -jnp.exp(self.a_log[...].astype(wide))[None, None] * jax.nn.softplus(decay.astype(wide))
        mixed, state = gated_delta_rule(
            q,
            k,
            v.reshape(*heads, -1, sizes.value_dim),
            log_decay.reshape(*heads, -1),
            jax.nn.sigmoid(beta.astype(wide)).reshape(*heads, -1),
            visible,
            # Its products are small, and a CPU multiplies small ones of bfloat16 more slowly (benchmarks/delta_rule.py).
            wide if backend() == "cpu" else dtype,
            None if cache is None else cache.state,
        )
        inputs = jnp.concatenate([state for _, state in convolved], axis=-1)
        if cache is not None:
            inputs = inputs.astype(cache.inputs.dtype)
        return mixed.reshape(batch, length, sizes.values), DeltaNetCache(inputs, state)

    def _gated(self, mixed: Float[Array, "B S x"], gate: Float[Array, "B S x"], *, dtype: jnp.dtype) -> Array:
        wide = sum_type(dtype)
        heads = mixed.astype(wide).reshape(*mixed.shape[:2], -1, self.sizes.value_dim)
        return self.norm(heads).reshape(mixed.shape) * jax.nn.silu(gate.astype(wide))


def _of_length_one(x: Float[Array, "*rows k"]) -> Float[Array, "*rows k"]:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
