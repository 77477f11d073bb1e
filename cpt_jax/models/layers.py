"""The block: normalisation, attention, feed-forward."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cpt_jax.models.attention import Attention, Cache, Rotation
from cpt_jax.models.linear import Linear, LoRAConfig, Weight
from cpt_jax.sharding.rules import constrain


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in the residual's own type (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, width: int, epsilon: float) -> None:
        self.epsilon = epsilon
        self.scale = Weight(jnp.ones((width,)), logical_axes=("hidden",))

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return x * inverse * self.scale[...].astype(x.dtype)[None, None, :]


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config, lora: LoRAConfig | None, rngs: nnx.Rngs) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        self.gate = Linear("gate", ("embed", "mlp"), (width, inner), lora, rngs)
        self.up = Linear("up", ("embed", "mlp"), (width, inner), lora, rngs)
        self.down = Linear("down", ("mlp", "embed"), (inner, width), lora, rngs)

    def __call__(self, x: Float[Array, "B S D"], dtype: jnp.dtype) -> Float[Array, "B S D"]:
        return self.down(jax.nn.silu(self.gate(x, dtype)) * self.up(x, dtype), dtype)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config, lora: LoRAConfig | None, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, lora, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config, lora, rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        angles: Rotation,
        mask: Bool[Array, "B S K"],
        dtype: jnp.dtype,
        cache: Cache | None = None,
        index: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        attended, cache = self.attention(self.attention_norm(x), angles, mask, dtype, cache, index)
        x = constrain(x + attended, "batch", "sequence", "hidden")
        x = x + self.mlp(self.mlp_norm(x), dtype)
        return constrain(x, "batch", "sequence", "hidden"), cache
