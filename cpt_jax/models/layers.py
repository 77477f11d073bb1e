"""The block: normalisation, attention, feed-forward."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cpt_jax.models.attention import Attention, GlobalAttention
from cpt_jax.models.config import ATTENTION
from cpt_jax.models.delta_net import DeltaNet
from cpt_jax.models.experts import Balance, Experts
from cpt_jax.models.feed_forward import FeedForward
from cpt_jax.models.kernels.visible import Visible
from cpt_jax.models.linear import LoRAConfig, Weight
from cpt_jax.models.lone_feed_forward import LoneFeedForward
from cpt_jax.models.mamba2 import Mamba2
from cpt_jax.models.norms import norm
from cpt_jax.models.remat import recomputed
from cpt_jax.models.rope import Rotation
from cpt_jax.models.short_conv import ShortConv
from cpt_jax.models.side_by_side import SideBySide
from cpt_jax.sharding.rules import constrain


def mixer_of(
    name: str, config, lora: LoRAConfig | None, rngs: nnx.Rngs
) -> Attention | DeltaNet | LoneFeedForward | Mamba2 | ShortConv | SideBySide:
    """What mixes the tokens of those layers that have it under this name."""
    if name == ATTENTION:
        return Attention(config, None, lora, rngs)
    sizes = next(kind.mixer for kind in config.layer_kinds if kind.mixer_name == name)
    classes = {
        "delta_net": DeltaNet,
        "feed_forward": LoneFeedForward,
        "mamba2": Mamba2,
        "short_conv": ShortConv,
        "side_by_side": SideBySide,
        GlobalAttention.name: Attention,
    }
    return classes[name](config, sizes, lora, rngs)


class Block(nnx.Module):
    """What mixes tokens (attention, mostly) and feed-forward, each added to its input: one after the other, or both to
    the same input; or the first alone. Without a name of the mixer it has none, and cannot be called."""

    def __init__(self, config, lora: LoRAConfig | None, rngs: nnx.Rngs, mixer: str | None) -> None:
        self.mixer = mixer
        self.parallel, self.scale = config.parallel_residual, config.residual_scale
        self.shared_norm = config.shared_norm
        before, after = config.norm_placement in ("before", "both"), config.norm_placement in ("after", "both")
        self.attention_norm = norm(config) if before else None
        if mixer is not None:
            setattr(self, mixer, mixer_of(mixer, config, lora, rngs))
        self.attention_out_norm = norm(config) if after else None
        self.mlp_norm = norm(config) if before and config.feed_forward and not config.shared_norm else None
        self.mlp = _fed(config, lora, rngs) if config.feed_forward else None
        self.mlp_out_norm = norm(config) if after and config.feed_forward else None
        self.layer_scalar = Weight(jnp.ones((1,)), logical_axes=("hidden",)) if config.layer_scalar else None

    def __call__(
        self,
        x: Float[Array, "B S D"],
        angles: Rotation,
        visible: Visible,
        dtype: jnp.dtype,
        counted: Float[Array, "B S"],
        cache: Any = None,
    ) -> tuple[Float[Array, "B S D"], Any, Balance | None]:
        """(output, cache, what the experts were given: of the tokens that are `counted`)."""
        assert self.mixer is not None
        mixed, cache = getattr(self, self.mixer)(x, angles, visible, dtype, cache, norm=_norm(self.attention_norm))
        mixed = recomputed(_norm(self.attention_out_norm))(mixed)
        summed = constrain(x + self._scaled(mixed), "batch", "sequence", "hidden")
        if self.mlp is None:
            return summed, cache, None
        inputs, mlp_norm = (
            x if self.parallel else summed,
            _norm(self.attention_norm if self.shared_norm else self.mlp_norm),
        )
        balance = None
        if isinstance(self.mlp, Experts):
            fed, balance = self.mlp(recomputed(mlp_norm)(inputs), dtype, counted)
        else:
            fed = self.mlp(inputs, dtype, mlp_norm)
        fed = recomputed(_norm(self.mlp_out_norm))(fed)
        outputs = summed + self._scaled(fed)
        if self.layer_scalar is not None:
            outputs = outputs * self.layer_scalar[...].astype(outputs.dtype)[None, None]
        return constrain(outputs, "batch", "sequence", "hidden"), cache, balance

    def _scaled(self, added: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return added if self.scale is None else added * self.scale


def _fed(config, lora: LoRAConfig | None, rngs: nnx.Rngs) -> FeedForward | Experts:
    return FeedForward(config, lora, rngs) if config.experts is None else Experts(config, lora, rngs)


def _norm(norm: Any) -> Callable[[Array], Array]:
    """What a norm does; nothing without one."""
    return (lambda x: x) if norm is None else norm
