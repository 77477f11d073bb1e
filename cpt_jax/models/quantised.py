"""Frozen kernels in 8 or 4 bits, multiplied back to the compute type where they are used (QLoRA: Dettmers et al. 2023,
arXiv 2305.14314); `qwix` quantises."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Quantisation = Literal["int8", "nf4"]
# NF4 has a scale for so many inputs of an output, as QLoRA's blocks of 64.
BLOCK = 64


def quantise(kernel: Float[Array, "*stack i o"], kind: Quantisation) -> Any:
    """A kernel as a `qwix.QArray`: int8 with a scale for each output, or NF4 with one for each block of inputs."""
    import qwix

    axes = tuple(range(kernel.ndim - 2))
    if kind == "int8":
        return qwix.quantize(kernel, jnp.int8, channelwise_axes=(*axes, kernel.ndim - 1))
    block = math.gcd(kernel.shape[-2], BLOCK)
    return qwix.quantize(kernel, "nf4", channelwise_axes=(*axes, kernel.ndim - 1), tiled_axes={kernel.ndim - 2: block})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfStack:
    """One layer of a stack of weights (quantised or not), cut out where it is used."""

    stack: Any
    place: int = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def dtype(self) -> jnp.dtype:
        return self.stack.dtype

    def gradient(self, of_layer: Array) -> "OfStack":
        """That of the stack, where this layer's is given."""
        around = ((self.place, len(self.stack) - self.place - 1), *((0, 0),) * of_layer.ndim)
        return OfStack(jnp.pad(of_layer[None], around), self.place)


def own_layer(weight: Any) -> Any:
    """A weight, cut out of the stack that it may be in."""
    return jax.tree.map(lambda leaf: leaf[weight.place], weight.stack) if isinstance(weight, OfStack) else weight


def is_quantised(weight: Any) -> bool:
    if isinstance(weight, OfStack):
        return is_quantised(weight.stack)
    return not isinstance(weight, jax.Array) and hasattr(weight, "qvalue")


def dense(weight: Any, dtype: jnp.dtype) -> Array:
    """A weight in `dtype`, however it is stored."""
    weight = own_layer(weight)
    if not is_quantised(weight):
        return weight.astype(dtype)
    import qwix

    return qwix.dequantize(weight).astype(dtype)
