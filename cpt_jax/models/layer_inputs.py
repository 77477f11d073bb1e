"""What each layer is given of each token besides the hidden states (per-layer embeddings, after Gemma 3n): rows of a
second vocabulary, and a projection of the first one's.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cpt_jax.models.linear import ACTIVATIONS, Linear, LoRAConfig
from cpt_jax.models.norms import RMSNorm, norm
from cpt_jax.models.products import sum_type
from cpt_jax.models.remat import recomputed


class InputsOfLayers(nnx.Module):
    """(norm(projection(x) / sqrt(D)) + rows) / sqrt 2, of all L layers together."""

    def __init__(self, config, rngs: nnx.Rngs) -> None:
        self.layers, self.size, width = config.num_layers, config.layer_input_size, config.hidden_size
        axes, shape = ("embed", "mlp"), (width, self.layers * self.size)
        self.projection = Linear("layer_inputs/projection", axes, shape, None, rngs)
        self.norm = RMSNorm(self.size, config.norm_epsilon, config.norm_offset)

    def __call__(
        self, x: Float[Array, "B S D"], rows: Float[Array, "B S LP"], dtype: jnp.dtype
    ) -> Float[Array, "L B S P"]:
        """Of the tokens' rows in both tables, in `dtype`."""

        def combined(x: Array, rows: Array) -> Array:
            projected = self.projection(x, dtype) * x.shape[-1] ** -0.5
            by_layer = (*x.shape[:2], self.layers, self.size)
            both = (self.norm(projected.reshape(by_layer)) + rows.reshape(by_layer)) * 2**-0.5
            return both.astype(dtype).transpose(2, 0, 1, 3)

        return recomputed(combined)(x, rows)


class LayerInput(nnx.Module):
    """What a block makes of its input: norm(projection(activation(gate(x)) * input))."""

    def __init__(self, config, lora: LoRAConfig | None, rngs: nnx.Rngs, path: str) -> None:
        width, size = config.hidden_size, config.layer_input_size
        self.activation = ACTIVATIONS[config.activation]
        self.input_gate = Linear(f"{path}/input_gate", ("embed", "mlp"), (width, size), lora, rngs)
        self.projection = Linear(f"{path}/projection", ("mlp", "embed"), (size, width), lora, rngs)
        self.norm = norm(config)

    def __call__(
        self, x: Float[Array, "B S D"], given: Float[Array, "B S P"], dtype: jnp.dtype
    ) -> Float[Array, "B S D"]:
        gate = self.input_gate(x, dtype).astype(dtype)

        def outer(gate: Array, given: Array) -> Array:
            return self.projection(self.activation(gate.astype(sum_type(dtype))) * given, dtype)

        return recomputed(self.norm)(recomputed(outer)(gate, given))
