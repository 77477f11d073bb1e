"""A feed-forward in the place of what mixes tokens, in models whose layers are one or the other (Nemotron-H: Blakeman et al.
2025, arXiv 2504.03624)."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cpt_jax.models.feed_forward import FeedForward
from cpt_jax.models.kernels.visible import Visible
from cpt_jax.models.linear import LoRAConfig
from cpt_jax.models.rope import Rotation


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoneFeedForwardConfig:
    """As wide as the decoder says."""

    name: ClassVar = "feed_forward"
    layer_type: ClassVar = "mlp"

    def empty_cache(self, width: int, layers: int, batch: int, dtype: jnp.dtype) -> tuple[()]:
        """Tokens do not see each other here."""
        return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoneExpertsConfig:
    """Experts in such a place (Nemotron 3), as the decoder says."""

    name: ClassVar = "lone_experts"
    layer_type: ClassVar = "moe"

    def empty_cache(self, width: int, layers: int, batch: int, dtype: jnp.dtype) -> tuple[()]:
        """Nor here."""
        return ()


class LoneFeedForward(nnx.Module):
    """It is called as what mixes tokens is."""

    def __init__(
        self, config, sizes: LoneFeedForwardConfig, lora: LoRAConfig | None, rngs: nnx.Rngs, *, path: str
    ) -> None:
        self.mlp = FeedForward(config, lora, rngs, path=f"{path}/mlp")

    def __call__(
        self,
        x: Float[Array, "B S D"],
        angles: Rotation,
        visible: Visible,
        dtype: jnp.dtype,
        cache: tuple[()] | None = None,
        norm: Callable[[Array], Array] = lambda x: x,
    ) -> tuple[Float[Array, "B S D"], tuple[()] | None]:
        """Of the normalised input: what `norm` makes of x."""
        return self.mlp(x, dtype, norm), cache
