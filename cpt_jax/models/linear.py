"""The linear layer, with its optional low-rank adapter (LoRA: Hu et al. 2021, arXiv 2106.09685)."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cpt_jax.core.errors import UserError
from cpt_jax.core.lazy import LazyArray, Slices
from cpt_jax.core.tree import Tree, flatten, unflatten
from cpt_jax.models.products import matmul

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
# By the names that config.json gives them.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Adapters of rank `rank` on the linears named in `targets`, scaled by alpha / rank."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = LINEARS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"LoRA rank is {self.rank}: give at least 1")
        for target in self.targets:
            if target not in LINEARS:
                raise UserError(f"LoRA target {target!r} is no linear layer; there are: {', '.join(LINEARS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Weight(nnx.Variable):
    """A weight; its metadata `logical_axes` names each axis (NNX's own `sharding_names` would shard eagerly)."""


class Linear(nnx.Module):
    """y = x W + b + scale (x A) B, the adapter only where it is asked for; never the merged W + scale A B, which costs
    a full product."""

    def __init__(
        self,
        name: str,
        axes: tuple[str, str],
        shape: tuple[int, int],
        lora: LoRAConfig | None,
        rngs: nnx.Rngs,
        bias: bool = False,
    ) -> None:
        self.kernel = Weight(initial_kernel(rngs, shape), logical_axes=axes)
        self.bias = Weight(jnp.zeros((shape[1],)), logical_axes=axes[1:]) if bias else None
        self.scale = lora.scale if lora is not None else 0.0
        self.has_adapter = lora is not None and name in lora.targets
        if lora is not None and self.has_adapter:
            self.lora_a, self.lora_b = adapter(lora.rank, axes, shape, rngs)

    def __call__(self, x: Float[Array, "*rows i"], dtype: jnp.dtype) -> Float[Array, "*rows o"]:
        y = matmul(x, self.kernel.get_value(), dtype)
        if self.bias is not None:
            y += self.bias[...].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        if self.has_adapter:
            y += matmul(matmul(x, self.lora_a[...], dtype) * self.scale, self.lora_b[...], dtype)
        return y


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


def merge_lora(weights: Tree, lora: LoRAConfig) -> Tree:
    """The weights without adapters: each added into its kernel, in float32, on the host, when it is asked for."""
    flat = flatten(weights)
    merged = {}
    for path, leaf in flat.items():
        if path.endswith(("/lora_a", "/lora_b")):
            continue
        layer = path.removesuffix("/kernel")
        if f"{layer}/lora_a" in flat:
            leaf = _merged(leaf, flat[f"{layer}/lora_a"], flat[f"{layer}/lora_b"], lora.scale)
        merged[path] = leaf
    return unflatten(merged)


def _merged(kernel, a, b, scale: float) -> LazyArray:
    """kernel [..., i, o] + scale a [..., i, r] b [..., r, o], float32."""

    def read(slices: Slices, dtype: np.dtype) -> np.ndarray:
        *stack, rows, columns = slices
        first, second = (
            np.asarray(part[(*stack, *inner)], np.float32)
            for part, inner in ((a, (rows, slice(None))), (b, (slice(None), columns)))
        )
        merged = np.asarray(kernel[slices], np.float32) + np.float32(scale) * np.matmul(first, second)
        return merged.astype(dtype, copy=False)

    return LazyArray(kernel.shape, np.float32, read)
