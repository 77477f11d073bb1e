"""The block: normalisation, attention, feed-forward."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cpt_jax.models.attention import Attention, GlobalAttention
from cpt_jax.models.config import DENSE, SHARING
from cpt_jax.models.delta_net import DeltaNet
from cpt_jax.models.experts import Balance, Experts
from cpt_jax.models.feed_forward import FeedForward
from cpt_jax.models.kernels.visible import Visible
from cpt_jax.models.latent_attention import LatentAttention
from cpt_jax.models.layer_inputs import LayerInput
from cpt_jax.models.linear import LoRAConfig, Weight
from cpt_jax.models.lone_feed_forward import LoneExpertsConfig, LoneFeedForward
from cpt_jax.models.mamba2 import Mamba2
from cpt_jax.models.norms import norm
from cpt_jax.models.remat import recomputed
from cpt_jax.models.rope import Rotation
from cpt_jax.models.short_conv import ShortConv
from cpt_jax.models.side_by_side import SideBySide
from cpt_jax.sharding.rules import constrain


def mixer_of(
    name: str, config, lora: LoRAConfig | None, rngs: nnx.Rngs, section: str
) -> Attention | DeltaNet | Experts | LatentAttention | LoneFeedForward | Mamba2 | ShortConv | SideBySide:
    """What mixes the tokens of those layers of a section that have it under this name."""
    sizes = next(kind.mixer for kind in config.layer_kinds if kind.mixer_name == name)
    path = f"{_path(section)}/{name}"
    if sizes is None or isinstance(sizes, GlobalAttention):
        return Attention(config, sizes, lora, rngs, path=path, sharing=section == SHARING)
    if isinstance(sizes, LoneExpertsConfig):
        return Experts(config, lora, rngs)
    classes = {
        "delta_net": DeltaNet,
        "feed_forward": LoneFeedForward,
        "latent_attention": LatentAttention,
        "mamba2": Mamba2,
        "short_conv": ShortConv,
        "side_by_side": SideBySide,
    }
    return classes[name](config, sizes, lora, rngs, path=path)


def _path(section: str) -> str:
    return f"layers/{section}" if section else "layers"


class Block(nnx.Module):
    """What mixes tokens (attention, mostly) and feed-forward, each added to its input: one after the other, or both to
    the same input, or the first alone; beside the feed-forward there may be experts; then what it makes of an input of
    its own, if it has one. Without a name of the mixer it has none, and cannot be called. `section`: the stack
    it is in (see `DecoderConfig.sections`)."""

    def __init__(self, config, lora: LoRAConfig | None, rngs: nnx.Rngs, mixer: str | None, section: str = "") -> None:
        self.mixer = mixer
        self.parallel, self.scale = config.parallel_residual, config.residual_scale
        self.shared_norm = config.shared_norm
        before, after = config.norm_placement in ("before", "both"), config.norm_placement in ("after", "both")
        self.attention_norm = norm(config) if before else None
        if mixer is not None:
            setattr(self, mixer, mixer_of(mixer, config, lora, rngs, section))
        self.attention_out_norm = norm(config) if after else None
        self.mlp_norm = norm(config) if before and config.feed_forward and not config.shared_norm else None
        self.mlp = _fed(config, lora, rngs, section) if config.feed_forward else None
        beside = config.experts_name == "experts" and section != DENSE
        self.experts = Experts(config, lora, rngs) if beside else None
        if beside:
            self.dense_out_norm, self.experts_norm, self.experts_out_norm = norm(config), norm(config), norm(config)
        self.mlp_out_norm = norm(config) if after and config.feed_forward else None
        has_input = config.layer_input_size is not None
        self.layer_input = LayerInput(config, lora, rngs, f"{_path(section)}/layer_input") if has_input else None
        self.layer_scalar = Weight(jnp.ones((1,)), logical_axes=("hidden",)) if config.layer_scalar else None

    def __call__(
        self,
        x: Float[Array, "B S D"],
        angles: Rotation,
        visible: Visible,
        dtype: jnp.dtype,
        counted: Float[Array, "B S"],
        cache: Any = None,
        own: Float[Array, "B S P"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Any, Balance | None]:
        """(output, cache, what the experts were given: of the tokens that are `counted`). `own`: its own input."""
        assert self.mixer is not None
        mixer, balance = getattr(self, self.mixer), None
        if isinstance(mixer, Experts):
            mixed, balance = mixer(recomputed(_norm(self.attention_norm))(x), dtype, counted)
        else:
            mixed, cache = mixer(x, angles, visible, dtype, cache, norm=_norm(self.attention_norm))
        mixed = recomputed(_norm(self.attention_out_norm))(mixed)
        summed = constrain(x + self._scaled(mixed), "batch", "sequence", "hidden")
        if self.mlp is None:
            return summed, cache, balance
        inputs, mlp_norm = (
            x if self.parallel else summed,
            _norm(self.attention_norm if self.shared_norm else self.mlp_norm),
        )
        if isinstance(self.mlp, Experts):
            fed, balance = self.mlp(recomputed(mlp_norm)(inputs), dtype, counted)
        else:
            fed = self.mlp(inputs, dtype, mlp_norm)
        if self.experts is not None:
            mixed, balance = self.experts(inputs, dtype, counted, self.experts_norm)
            fed = recomputed(self.dense_out_norm)(fed) + recomputed(self.experts_out_norm)(mixed)
        fed = recomputed(_norm(self.mlp_out_norm))(fed)
        outputs = summed + self._scaled(fed)
        if self.layer_input is not None:
            assert own is not None
            outputs += self.layer_input(outputs, own, dtype)
        if self.layer_scalar is not None:
            outputs = outputs * self.layer_scalar[...].astype(outputs.dtype)[None, None]
        return constrain(outputs, "batch", "sequence", "hidden"), cache, balance

    def _scaled(self, added: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return added if self.scale is None else added * self.scale


def _fed(config, lora: LoRAConfig | None, rngs: nnx.Rngs, section: str) -> FeedForward | Experts:
    if config.experts_name == "mlp" and section != DENSE:
        return Experts(config, lora, rngs)
    size = config.sharing_intermediate_size if section == SHARING else None
    return FeedForward(config, lora, rngs, path=f"{_path(section)}/mlp", intermediate_size=size)


def _norm(norm: Any) -> Callable[[Array], Array]:
    """What a norm does; nothing without one."""
    return (lambda x: x) if norm is None else norm
