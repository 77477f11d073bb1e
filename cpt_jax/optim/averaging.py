"""The exponential moving average of what trains, in float32: in bfloat16, 0.999 x + 0.001 y rounds back to x."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMA:
    """average = d average + (1 - d) weights after each step, d = min(decay, (1 + step) / (10 + step)): early weights
    count less."""

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"EMA decay is {self.decay}: give a number from 0 up to, not including, 1")

    def update(self, average: Tree, weights: Tree, step: Int[Array, ""]) -> Tree:
        """The average after the step with number `step` (from 0)."""
        decay = jnp.minimum(self.decay, (1.0 + step) / (10.0 + step))
        return jax.tree.map(lambda a, w: a * decay + w.astype(jnp.float32) * (1 - decay), average, weights)
