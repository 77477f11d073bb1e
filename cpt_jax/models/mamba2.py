"""Mamba 2 (Dao & Gu 2024, arXiv 2405.21060), as hybrids have it in the place of attention."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cpt_jax.core.errors import UserError
from cpt_jax.models.causal_conv import causal_conv
from cpt_jax.models.kernels.visible import SAVED, Visible
from cpt_jax.models.linear import Linear, LoRAConfig, Weight, applied
from cpt_jax.models.norms import RMSNorm
from cpt_jax.models.products import sum_type
from cpt_jax.models.remat import named, recomputed
from cpt_jax.models.rope import Rotation
from cpt_jax.models.state_space import State, state_space
from cpt_jax.sharding.hardware import backend


class Mamba2Cache(NamedTuple):
    """The convolution's last inputs, and the state (of all layers, with a leading axis)."""

    inputs: Float[Array, "B before C"]
    state: State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """`heads` of width `head_dim`, in `groups` that share queries and keys of width `state_size`; values, keys and queries
    pass through a convolution over `kernel_size` tokens, with a bias if `conv_bias`. `bias` and `out_bias`: of the
    projections before and behind. `step_limits`: what the steps are clipped to. `norm`: what the state space gives is
    normalised before it is multiplied by its gate, behind that, or not at all. `factors`: what the projections of gate,
    values, keys, queries and steps are multiplied by."""

    name: ClassVar = "mamba2"
    layer_type: ClassVar = "linear_attention"

    heads: int
    groups: int
    head_dim: int
    state_size: int
    kernel_size: int
    conv_bias: bool = True
    bias: bool = False
    out_bias: bool = False
    step_limits: tuple[float, float] = (0.0, math.inf)
    norm: Literal["before gate", "behind gate"] | None = "behind gate"
    factors: tuple[float, float, float, float, float] | None = None

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise UserError(f"mamba_n_heads {self.heads} is no multiple of mamba_n_groups {self.groups}")

    @property
    def values(self) -> int:
        """Numbers of a token's values."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Numbers of a token's keys, and of its queries."""
        return self.groups * self.state_size

    @property
    def channels(self) -> int:
        """That pass through the convolution."""
        return self.values + 2 * self.keys

    def empty_cache(self, width: int, layers: int, batch: int, dtype: jnp.dtype) -> Mamba2Cache:
        """Of layers that have seen nothing."""
        state = (layers, batch, self.groups, self.state_size, self.heads // self.groups, self.head_dim)
        inputs = (layers, batch, self.kernel_size - 1, self.channels)
        return Mamba2Cache(jnp.zeros(inputs, dtype), jnp.zeros(state, sum_type(dtype)))


class Mamba2(nnx.Module):
    """o(norm(y * silu(gate(x)))), where y is what the state space makes of q, k and v, projections behind the convolution
    and SiLU, and v times `skip`; or o(norm(y) * silu(gate(x))). A token's step is softplus(step(x) + step_bias), its decay exp(-exp(a_log) step).

    In the paper's terms gate is z, v is x, k is B, q is C and step is dt. The norm is of each group's heads together.
    """

    def __init__(self, config, sizes: Mamba2Config, lora: LoRAConfig | None, rngs: nnx.Rngs, *, path: str) -> None:
        self.sizes = sizes
        # As in `FeedForward`.
        self.apart = config.layer_loop == "unroll" and config.remat is None
        width, heads = config.hidden_size, sizes.heads

        def linear(name: str, outputs: int, axis: str = "heads") -> Linear:
            return Linear(f"{path}/{name}", ("embed", axis), (width, outputs), lora, rngs, sizes.bias)

        self.gate, self.v, self.step = linear("gate", sizes.values), linear("v", sizes.values), linear("step", heads)
        # All heads of a group read these.
        self.k, self.q = linear("k", sizes.keys, "hidden"), linear("q", sizes.keys, "hidden")
        self.o = Linear(f"{path}/o", ("heads", "embed"), (sizes.values, width), lora, rngs, sizes.out_bias)
        self.conv = Weight(
            jax.random.normal(rngs.params(), (sizes.channels, 1, sizes.kernel_size)) * sizes.kernel_size**-0.5,
            logical_axes=("hidden", "hidden", "hidden"),
        )
        self.bias = Weight(jnp.zeros((sizes.channels,)), logical_axes=("hidden",)) if sizes.conv_bias else None
        # The paper's beginning: exp(a_log) between 1 and 16, steps between 0.001 and 0.1.
        rates = jax.random.uniform(rngs.params(), (heads,), minval=1.0, maxval=16.0)
        self.a_log = Weight(jnp.log(rates), logical_axes=("hidden",))
        steps = jnp.exp(jax.random.uniform(rngs.params(), (heads,), minval=math.log(1e-3), maxval=math.log(0.1)))
        self.step_bias = Weight(jnp.log(jnp.expm1(steps)), logical_axes=("hidden",))
        self.skip = Weight(jnp.ones((heads,)), logical_axes=("hidden",))
        if sizes.norm is not None:
            self.norm = RMSNorm(sizes.values, config.norm_epsilon, groups=sizes.groups)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        angles: Rotation,
        visible: Visible,
        dtype: jnp.dtype,
        cache: Mamba2Cache | None = None,
        norm: Callable[[Array], Array] = lambda x: x,
    ) -> tuple[Float[Array, "B S D"], Mamba2Cache | None]:
        """Of the normalised input: what `norm` makes of x. Positions are not told apart but by order."""
        linears, factors = (self.gate, self.v, self.k, self.q, self.step), self.sizes.factors

        def projected(x: Array) -> list[Array]:
            parts = applied(linears, norm(x), dtype)
            if factors is not None:
                parts = [y * factor for y, factor in zip(parts, factors, strict=True)]
            # What is kept for the backward pass is kept rounded, as autocast does.
            return [*(y.astype(dtype) for y in parts[:-1]), parts[-1]]

        gate, v, k, q, step = recomputed(projected)(x)
        mix = functools.partial(self._mixed, visible=visible, dtype=dtype, cache=cache)
        mixed, new = recomputed(mix, apart=self.apart)(q, k, v, step)
        mixed = named(mixed.astype(dtype), SAVED)
        gated = recomputed(functools.partial(self._gated, dtype=dtype))(mixed, gate)
        return self.o(gated, dtype), None if cache is None else new

    def _mixed(
        self, q, k, v, step, *, visible: Visible, dtype: jnp.dtype, cache: Mamba2Cache | None
    ) -> tuple[Float[Array, "B S x"], Mamba2Cache]:
        sizes, (batch, length, _), wide = self.sizes, v.shape, sum_type(dtype)
        ends = (sizes.values, sizes.values + sizes.keys)
        kernels = jnp.split(self.conv[...], ends)
        biases = (0.0,) * 3 if self.bias is None else jnp.split(self.bias[...].astype(wide)[None, None], ends, axis=-1)
        before = (None,) * 3 if cache is None else jnp.split(cache.inputs, ends, axis=-1)
        convolved = [
            causal_conv(y.astype(wide), kernel, visible, state)
            for y, kernel, state in zip((v, k, q), kernels, before, strict=True)
        ]
        v, k, q = (jax.nn.silu(y + bias) for (y, _), bias in zip(convolved, biases, strict=True))
        in_groups = (batch, length, sizes.groups, -1)
        step = jax.nn.softplus(step.astype(wide) + self.step_bias[...].astype(wide)[None, None])
        if sizes.step_limits != (0.0, math.inf):
            step = jnp.clip(step, *sizes.step_limits)
        step = step.reshape(in_groups)
        rates = jnp.exp(self.a_log[...].astype(wide)).reshape(1, 1, sizes.groups, -1)
        v = v.reshape(*step.shape, sizes.head_dim)
        mixed, state = state_space(
            q.reshape(in_groups),
            k.reshape(in_groups),
            step[..., None] * v,
            -rates * step,
            visible,
            # On a CPU bfloat16 would gain little (benchmarks/state_space.py).
            wide if backend() == "cpu" else dtype,
            None if cache is None else cache.state,
        )
        mixed += self.skip[...].astype(wide).reshape(1, 1, sizes.groups, -1, 1) * v
        inputs = jnp.concatenate([state for _, state in convolved], axis=-1)
        if cache is not None:
            inputs = inputs.astype(cache.inputs.dtype)
        return mixed.reshape(batch, length, sizes.values), Mamba2Cache(inputs, state)

    def _gated(self, mixed: Float[Array, "B S x"], gate: Float[Array, "B S x"], *, dtype: jnp.dtype) -> Array:
        wide = sum_type(dtype)
        mixed, gate = mixed.astype(wide), jax.nn.silu(gate.astype(wide))
        match self.sizes.norm:
            case "before gate":
                return self.norm(mixed) * gate
            case "behind gate":
                return self.norm(mixed * gate)
            case None:
                return mixed * gate
