"""The linear layer, with its optional low-rank adapter (LoRA: Hu et al. 2021, arXiv 2106.09685; DoRA: Liu et al. 2024,
arXiv 2402.09353)."""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cpt_jax.core.errors import UserError
from cpt_jax.core.lazy import LazyArray, Slices, stacked
from cpt_jax.core.tree import Tree, flatten, match, unflatten
from cpt_jax.models.products import matmul, matmuls, sum_type
from cpt_jax.models.quantised import dense

# Adapted where nothing else is asked for, by the last part of their paths.
LINEARS = ("q", "k", "v", "o", "q_a", "q_b", "kv_a", "kv_b", "gate", "up", "down")
_OF_LAYERS = (
    *(f"layers/attention/{name}" for name in ("q", "k", "v", "o", "gate")),
    *(f"layers/global_attention/{name}" for name in ("q", "k", "v", "o")),
    *(f"layers/delta_net/{name}" for name in ("q", "k", "v", "o", "gate", "beta", "decay")),
    *(f"layers/feed_forward/mlp/{name}" for name in ("gate", "up", "down")),
    *(f"layers/latent_attention/{name}" for name in ("q", "q_a", "q_b", "kv_a", "kv_b", "o")),
    *(f"layers/lone_experts/{name}" for name in ("gate", "up", "down")),
    *(f"layers/lone_experts/shared/{name}" for name in ("gate", "up", "down")),
    *(f"layers/lone_experts/{name}" for name in ("latent_in", "latent_out")),
    *(f"layers/mamba2/{name}" for name in ("q", "k", "v", "o", "gate", "step")),
    *(f"layers/side_by_side/attention/{name}" for name in ("q", "k", "v", "o")),
    *(f"layers/side_by_side/mamba2/{name}" for name in ("q", "k", "v", "o", "gate", "step")),
    *(f"layers/short_conv/{name}" for name in ("q", "k", "v", "o")),
    *(f"layers/mlp/{name}" for name in ("gate", "up", "down")),
    *(f"layers/mlp/shared/{name}" for name in ("gate", "up", "down")),
    "layers/mlp/shared_gate",
    *(f"layers/experts/{name}" for name in ("gate", "up", "down")),
    *(f"layers/layer_input/{name}" for name in ("input_gate", "projection")),
    *(f"layers/sharing/{mixer}/{name}" for mixer in ("attention", "global_attention") for name in "qo"),
    *(f"layers/sharing/mlp/{name}" for name in ("gate", "up", "down")),
    *(f"layers/sharing/layer_input/{name}" for name in ("input_gate", "projection")),
)
# The first layers may be a stack of their own.
PATHS = (*_OF_LAYERS, *(path.replace("layers/", "layers/dense/", 1) for path in _OF_LAYERS if "sharing" not in path))
# What an adapter trains, by the ends of its leaves' paths.
ADAPTER_LEAVES = ("/lora_a", "/lora_b", "/magnitude")
# And what DoRA keeps of the frozen kernel.
KERNEL_NORM = "/kernel_norm"
# What is never trained, though it is a weight.
LAYER_SCALAR, CORRECTION_BIAS = "/layer_scalar", "/correction_bias"
CONSTANTS = (LAYER_SCALAR, CORRECTION_BIAS, "/xielu/beta", "/xielu/eps")
_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
# By the names that config.json gives them; several are one function (transformers, activations.py).
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
# And that which has weights (`xielu`), of feed-forwards without a gate.
XIELU = "xielu"
Scaling = Literal["alpha/rank", "alpha/sqrt(rank)"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The adapter of one linear: its rank, what its product is multiplied by, and the rest as in `LoRAConfig`."""

    rank: int
    alpha: float
    scaling: Scaling
    dora: bool
    dropout: float

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank if self.scaling == "alpha/rank" else math.sqrt(self.rank))

    def of_rank(self, rank: int) -> "AdapterConfig":
        """Of another rank, and an alpha with which the scale is the same."""
        share = rank / self.rank if self.scaling == "alpha/rank" else math.sqrt(rank / self.rank)
        return dataclasses.replace(self, rank=rank, alpha=self.alpha * share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Adapters of rank `rank` on the linears named in `targets`, scaled by alpha / rank or, rank-stabilised, by alpha /
    sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).

    Linears are named by the last part of their paths ("q"), by a whole path ("layers/attention/q"), or by a pattern over
    paths ("layers/mlp/*"). `rank_pattern` and `alpha_pattern` give some linears another rank and alpha; the first pattern
    that matches counts. `dora` trains each output's magnitude apart from its direction. `dropout` is the share of the
    adapters' inputs that is dropped in training.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = LINEARS
    scaling: Scaling = "alpha/rank"
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    dora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for rank in (self.rank, *dict(self.rank_pattern).values()):
            if rank < 1:
                raise UserError(f"LoRA rank is {rank}: give at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA dropout is {self.dropout}: give a share of at least 0 and below 1")
        patterns = (*self.targets, *dict(self.rank_pattern), *dict(self.alpha_pattern))
        names = {path.rpartition("/")[2] for path in PATHS}
        match([pattern for pattern in patterns if pattern not in names], PATHS)

    @property
    def default(self) -> AdapterConfig:
        """Of linears that no pattern names."""
        return AdapterConfig(
            rank=self.rank, alpha=self.alpha, scaling=self.scaling, dora=self.dora, dropout=self.dropout
        )

    def adapter(self, path: str) -> AdapterConfig | None:
        """The adapter of the linear at this path ("layers/attention/q"), if it has one."""
        if not any(_names(target, path) for target in self.targets):
            return None
        rank = next((rank for pattern, rank in self.rank_pattern if _names(pattern, path)), self.rank)
        alpha = next((alpha for pattern, alpha in self.alpha_pattern if _names(pattern, path)), self.alpha)
        return dataclasses.replace(self.default, rank=rank, alpha=alpha)


def _names(pattern: str, path: str) -> bool:
    return pattern == path.rpartition("/")[2] or fnmatch.fnmatchcase(path, pattern)


class Weight(nnx.Variable):
    """A weight; its metadata `logical_axes` names each axis (NNX's own `sharding_names` would shard eagerly)."""


class Linear(nnx.Module):
    """y = m * (x W + scale (x A) B) + b, the adapter only where it is asked for, the magnitude's factor m only with DoRA;
    never the merged W + scale A B, which costs a full product."""

    def __init__(
        self,
        path: str,
        axes: tuple[str, str],
        shape: tuple[int, int],
        lora: LoRAConfig | None,
        rngs: nnx.Rngs,
        bias: bool = False,
    ) -> None:
        self.kernel = Weight(initial_kernel(rngs, shape), logical_axes=axes)
        self.bias = Weight(jnp.zeros((shape[1],)), logical_axes=axes[1:]) if bias else None
        self.adapter = lora.adapter(path) if lora is not None else None
        # Of one call in training; see `drop_inputs`.
        self.dropout_key: Any = nnx.data(None)
        if self.adapter is not None:
            self.lora_a, self.lora_b = adapter(self.adapter.rank, axes, shape, rngs)
            if self.adapter.dora:
                norm = jnp.linalg.norm(self.kernel[...], axis=0)
                self.kernel_norm = Weight(norm, logical_axes=axes[1:])
                self.magnitude = Weight(norm, logical_axes=axes[1:])

    def __call__(self, x: Float[Array, "*rows i"], dtype: jnp.dtype) -> Float[Array, "*rows o"]:
        return applied((self,), x, dtype)[0]

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "i o"]:
        """What a layer without a bias multiplies its inputs with, adapter and all."""
        low_rank = None if self.adapter is None else self.lora_a[...]
        return self._finished(dense(self.kernel.get_value(), sum_type(dtype)), low_rank, dtype)

    def _finished(self, y: Array, low_rank: Array | None, dtype: jnp.dtype) -> Float[Array, "*rows o"]:
        """Of the product with the kernel and that with A, what the layer gives."""
        if self.adapter is not None and low_rank is not None:
            y += matmul(low_rank * self.adapter.scale, self.lora_b[...], dtype, name=None)
            if self.adapter.dora:
                y *= self._magnitude_factor(dtype).astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        if self.bias is not None:
            y += self.bias[...].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y

    def _magnitude_factor(self, dtype: jnp.dtype) -> Float[Array, "o"]:
        """magnitude / |W + scale A B|, each output's norm taken for a constant (DoRA, section 4.3).

        The norm comes from |W|, which is kept, and products of rank r: W + scale A B is never made, and W has no
        gradient. As long as B is zero and the magnitude is |W|, this is 1, bit for bit.
        """
        assert self.adapter is not None
        wide, scale = sum_type(dtype), self.adapter.scale
        a, b = (jax.lax.stop_gradient(factor[...]) for factor in (self.lora_a, self.lora_b))
        across = jax.lax.stop_gradient(matmul(a.T, self.kernel.get_value(), dtype))
        b, gram = b.astype(wide), jnp.matmul(a.T, a, precision="highest", preferred_element_type=wide)
        growth = jnp.sum(b * (2 * scale * across + scale**2 * jnp.matmul(gram, b, precision="highest")), axis=0)
        tiny = jnp.finfo(jnp.float32).tiny
        norm = jnp.maximum(jax.lax.stop_gradient(self.kernel_norm[...]).astype(wide), tiny**0.5)
        # 1 + growth / |W|^2 is |W + scale A B|^2 / |W|^2; rounding may not take it to zero or below.
        ratio = jnp.sqrt(jnp.maximum(1 + growth / norm**2, 1e-12))
        return (1 + (self.magnitude[...].astype(wide) - norm) / norm) / ratio


def applied(linears: Sequence[Linear], x: Float[Array, "*rows i"], dtype: jnp.dtype) -> list[Float[Array, "*rows o"]]:
    """What each of the layers gives on the same input, of which only one copy is kept for the backward pass."""
    weights: list[Any] = [linear.kernel.get_value() for linear in linears]
    # An adapter that drops inputs drops others than its neighbours do. The factors A of the rest are one matrix: x and its
    # gradient are read and written once for all of them.
    sharing = [linear for linear in linears if linear.adapter is not None and linear.dropout_key is None]
    factors = [linear.lora_a[...] for linear in sharing]
    outputs = matmuls(x, [*weights, *([jnp.concatenate(factors, axis=1)] if factors else [])], dtype)
    ends = np.cumsum([factor.shape[1] for factor in factors])[:-1]
    shared = jnp.split(outputs[-1], ends, axis=-1) if factors else []
    low_rank = dict(zip(map(id, sharing), shared, strict=True))
    for linear in linears:
        if linear.adapter is not None and linear.dropout_key is not None:
            kept = _dropped(x, linear.adapter.dropout, linear.dropout_key)
            low_rank[id(linear)] = matmul(kept, linear.lora_a[...], dtype)
    return [
        linear._finished(y, low_rank.get(id(linear)), dtype)
        for linear, y in zip(linears, outputs[: len(linears)], strict=True)
    ]


def drop_inputs(module: nnx.Module, key: Array) -> None:
    """Makes the adapters in a module, which lives in one traced function, drop inputs in its next call."""
    for number, (_, part) in enumerate(nnx.iter_modules(module)):
        if isinstance(part, Linear) and part.adapter is not None and part.adapter.dropout > 0:
            part.dropout_key = jax.random.fold_in(key, number)


def _dropped(x: Array, rate: float, key: Array) -> Array:
    """x with a share of its numbers zero and the others larger, so that the mean stays (Srivastava et al. 2014)."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def initial_kernel(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Float[Array, "*stack i o"]:
    """Normal numbers, scaled by the inputs' number."""
    return jax.random.normal(rngs.params(), shape) * shape[-2] ** -0.5


def adapter(rank: int, axes: tuple[str, ...], shape: tuple[int, ...], rngs: nnx.Rngs) -> tuple[Weight, Weight]:
    """(A [..., i, r], B [..., r, o]) of a kernel [..., i, o]: A as PEFT draws it (Kaiming uniform with a = sqrt 5), B
    zero, so that attaching changes nothing."""
    *stack, inputs, outputs = shape
    bound = inputs**-0.5
    a = jax.random.uniform(rngs.params(), (*stack, inputs, rank), minval=-bound, maxval=bound)
    first = Weight(a, logical_axes=(*axes[:-1], "rank"))
    return first, Weight(jnp.zeros((*stack, rank, outputs)), logical_axes=(*axes[:-2], "rank", axes[-1]))


def with_magnitudes(weights: Tree, lora: LoRAConfig) -> Tree:
    """The weights, with what DoRA keeps of each adapted kernel: its outputs' norms, which are also the first magnitudes
    (read when they are asked for)."""
    flat = flatten(weights)
    for layer in _adapted(flat) if lora.dora else ():
        norms = column_norms(flat[f"{layer}/kernel"])
        flat[f"{layer}/kernel_norm"] = norms
        flat.setdefault(f"{layer}/magnitude", norms)
    return unflatten(flat)


def _adapted(flat: Mapping[str, Any]) -> list[str]:
    return [path.removesuffix("/lora_a") for path in flat if path.endswith("/lora_a")]


def column_norms(kernel: Any) -> LazyArray:
    """|W| by output, of a kernel [..., i, o], summed in float64."""
    *stack, _, outputs = kernel.shape

    def read(slices: Slices, dtype: np.dtype) -> np.ndarray:
        def one(index: tuple[int, ...], columns: Slices) -> np.ndarray:
            return _norms(np.asarray(kernel[(*index, slice(None), *columns)], np.float32))

        return stacked(slices, len(stack), dtype, one)

    return LazyArray((*stack, outputs), np.float32, read)


def _norms(kernel: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(np.square(kernel, dtype=np.float64), axis=-2))


def merge_lora(weights: Tree, lora: LoRAConfig) -> Tree:
    """The weights without adapters: each added into its kernel, in float32, on the host, when it is asked for."""
    flat = flatten(weights)
    merged = {}
    for path, leaf in flat.items():
        if path.endswith((*ADAPTER_LEAVES, KERNEL_NORM)):
            continue
        layer = path.removesuffix("/kernel")
        if f"{layer}/lora_a" in flat:
            settings = lora.adapter(layer)
            assert settings is not None
            factors = (flat[f"{layer}/lora_a"], flat[f"{layer}/lora_b"])
            leaf = _merged(leaf, *factors, flat.get(f"{layer}/magnitude"), settings.scale)
        merged[path] = leaf
    return unflatten(merged)


def _merged(kernel: Any, a: Any, b: Any, magnitude: Any, scale: float) -> LazyArray:
    """kernel [..., i, o] + scale a [..., i, r] b [..., r, o], float32; with each output's norm its magnitude, if there
    is one."""

    def read(slices: Slices, dtype: np.dtype) -> np.ndarray:
        *stack, rows, columns = slices
        # A norm takes all rows.
        read_rows = rows if magnitude is None else slice(0, kernel.shape[-2])
        first = np.asarray(a[(*stack, read_rows, slice(None))], np.float32)
        second = np.asarray(b[(*stack, slice(None), columns)], np.float32)
        whole = np.asarray(kernel[(*stack, read_rows, columns)], np.float32)
        whole = whole + np.float32(scale) * np.matmul(first, second)
        if magnitude is not None:
            norms = np.maximum(_norms(whole), np.finfo(np.float32).tiny)
            factor = np.asarray(magnitude[(*stack, columns)], np.float64) / norms
            whole = whole[..., rows, :] * factor.astype(np.float32)[..., None, :]
        return whole.astype(dtype, copy=False)

    return LazyArray(kernel.shape, np.float32, read)
