"""The feed-forward that every token goes through."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cpt_jax.models.linear import ACTIVATIONS, XIELU, Linear, LoRAConfig, applied
from cpt_jax.models.products import sum_type
from cpt_jax.models.remat import named, recomputed
from cpt_jax.models.xielu import LearntActivation


class FeedForward(nnx.Module):
    """down(activation(gate(x)) * up(x)) (gated linear units: Shazeer 2020, arXiv 2002.05202), or without a gate
    down(activation(up(x)))."""

    def __init__(
        self,
        config,
        lora: LoRAConfig | None,
        rngs: nnx.Rngs,
        *,
        path: str = "layers/mlp",
        intermediate_size: int | None = None,
    ) -> None:
        width, inner, bias = config.hidden_size, intermediate_size or config.intermediate_size, config.mlp_bias
        self.gated, self.activation = config.gated, ACTIVATIONS.get(config.activation)
        self.xielu = LearntActivation() if config.activation == XIELU else None
        self.gate_scale, self.down_scale = config.gate_scale, config.down_scale
        # A layer that is recomputed as a whole is compiled apart already.
        self.apart = config.layer_loop == "unroll" and config.remat is None
        if self.gated:
            self.gate = Linear(f"{path}/gate", ("embed", "mlp"), (width, inner), lora, rngs, bias)
        self.up = Linear(f"{path}/up", ("embed", "mlp"), (width, inner), lora, rngs, bias)
        self.down = Linear(f"{path}/down", ("mlp", "embed"), (inner, width), lora, rngs, bias)

    def __call__(
        self, x: Float[Array, "B S D"], dtype: jnp.dtype, norm: Callable[[Array], Array] = lambda x: x
    ) -> Float[Array, "B S D"]:
        """Of the normalised input: what `norm` makes of x."""
        linears = (self.up, self.gate) if self.gated else (self.up,)
        # What is kept for the backward pass is kept rounded, as autocast does.
        inner = recomputed(lambda x: [y.astype(dtype) for y in applied(linears, norm(x), dtype)])(x)
        inner = [named(y, name) for y, name in zip(inner, ("mlp_up", "mlp_gate"), strict=False)]

        def outer(up: Array, gate: Array | None = None) -> Array:
            wide, activation = sum_type(dtype), self.xielu or self.activation
            assert activation is not None
            if gate is None:
                product = activation(up.astype(wide))
            else:
                gate = gate.astype(wide) if self.gate_scale is None else gate.astype(wide) * self.gate_scale
                product = activation(gate) * up
            fed = self.down(product, dtype)
            return fed if self.down_scale is None else fed * self.down_scale

        return recomputed(outer, apart=self.apart)(*inner)
