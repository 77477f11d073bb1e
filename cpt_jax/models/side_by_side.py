"""Attention and Mamba 2 side by side in each layer, as Falcon-H1 has them (Zuo et al. 2025, arXiv 2507.22448)."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, cast

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cpt_jax.models.attention import Attention
from cpt_jax.models.kernels.cached import KeyCache
from cpt_jax.models.kernels.visible import Visible
from cpt_jax.models.linear import LoRAConfig
from cpt_jax.models.mamba2 import Mamba2, Mamba2Cache, Mamba2Config
from cpt_jax.models.rope import Rotation

BothCaches = tuple[KeyCache, Mamba2Cache]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideBySideConfig:
    """Attention with the decoder's heads, and Mamba 2; each has factors of its input and of what it gives."""

    name: ClassVar = "side_by_side"
    layer_type: ClassVar = "hybrid"

    mamba2: Mamba2Config
    attention_factors: tuple[float, float] = (1.0, 1.0)
    mamba2_factors: tuple[float, float] = (1.0, 1.0)


class SideBySide(nnx.Module):
    """attention(x) + mamba2(x), with their factors."""

    def __init__(self, config, sizes: SideBySideConfig, lora: LoRAConfig | None, rngs: nnx.Rngs, *, path: str) -> None:
        self.sizes = sizes
        self.attention = Attention(config, None, lora, rngs, path=f"{path}/attention")
        self.mamba2 = Mamba2(config, sizes.mamba2, lora, rngs, path=f"{path}/mamba2")

    def __call__(
        self,
        x: Float[Array, "B S D"],
        angles: Rotation,
        visible: Visible,
        dtype: jnp.dtype,
        cache: BothCaches | None = None,
        norm: Callable[[Array], Array] = lambda x: x,
    ) -> tuple[Float[Array, "B S D"], BothCaches | None]:
        """Of the normalised input: what `norm` makes of x."""
        keys, state = (None, None) if cache is None else cache
        (first, after_first), (second, after_second) = self.sizes.attention_factors, self.sizes.mamba2_factors
        attended, keys = self.attention(x, angles, visible, dtype, keys, norm=lambda x: norm(x) * first)
        mixed, state = self.mamba2(x, angles, visible, dtype, state, norm=lambda x: norm(x) * second)
        after = None if cache is None else cast(BothCaches, (keys, state))
        return attended * after_first + mixed * after_second, after
