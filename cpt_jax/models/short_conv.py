"""The gated short convolution that LFM2 has in most layers in the place of attention (Liquid AI 2025, arXiv
2511.23404)."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cpt_jax.models.causal_conv import causal_conv
from cpt_jax.models.kernels.visible import Visible
from cpt_jax.models.linear import Linear, LoRAConfig, Weight, applied
from cpt_jax.models.products import sum_type
from cpt_jax.models.remat import recomputed
from cpt_jax.models.rope import Rotation


class ShortConvCache(NamedTuple):
    """The convolution's last inputs."""

    inputs: Float[Array, "B before D"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortConvConfig:
    """A convolution over `kernel_size` tokens; `bias` of it and of its projections."""

    name: ClassVar = "short_conv"
    layer_type: ClassVar = "conv"

    kernel_size: int
    bias: bool = False

    def empty_cache(self, width: int, layers: int, batch: int, dtype: jnp.dtype) -> ShortConvCache:
        """Of layers that have seen nothing."""
        return ShortConvCache(jnp.zeros((layers, batch, self.kernel_size - 1, width), dtype))


class ShortConv(nnx.Module):
    """o(q(x) * conv(k(x) * v(x))); in the paper's terms q is C, k is B."""

    def __init__(self, config, sizes: ShortConvConfig, lora: LoRAConfig | None, rngs: nnx.Rngs, *, path: str) -> None:
        width = config.hidden_size

        def linear(name: str, axes: tuple[str, str]) -> Linear:
            return Linear(f"{path}/{name}", axes, (width, width), lora, rngs, sizes.bias)

        self.q, self.k, self.v = (linear(name, ("embed", "heads")) for name in "qkv")
        self.o = linear("o", ("heads", "embed"))
        self.conv = Weight(
            jax.random.normal(rngs.params(), (width, 1, sizes.kernel_size)) * sizes.kernel_size**-0.5,
            logical_axes=("hidden", "hidden", "hidden"),
        )
        self.bias = Weight(jnp.zeros((width,)), logical_axes=("hidden",)) if sizes.bias else None

    def __call__(
        self,
        x: Float[Array, "B S D"],
        angles: Rotation,
        visible: Visible,
        dtype: jnp.dtype,
        cache: ShortConvCache | None = None,
        norm: Callable[[Array], Array] = lambda x: x,
    ) -> tuple[Float[Array, "B S D"], ShortConvCache | None]:
        """Of the normalised input: what `norm` makes of x."""
        wide = sum_type(dtype)
        linears = (self.q, self.k, self.v)
        q, k, v = recomputed(lambda x: [y.astype(dtype) for y in applied(linears, norm(x), dtype)])(x)

        def mixed(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            state = None if cache is None else cache.inputs
            y, inputs = causal_conv(k.astype(wide) * v.astype(wide), self.conv[...], visible, state)
            return q * (y if self.bias is None else y + self.bias[...].astype(wide)[None, None]), inputs

        y, inputs = recomputed(mixed)(q, k, v)
        return self.o(y, dtype), None if cache is None else ShortConvCache(inputs.astype(cache.inputs.dtype))
