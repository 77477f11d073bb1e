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
    count less.

    With `every` > 1 it is moved after every so many steps only, by d ** `every`, however many of them were skipped: about
    the same average, for less memory traffic. With `on_host` it lies in the host's memory, and comes to the devices when it is moved (and, for a
    mean teacher, in every step).
    """

    decay: float = 0.999
    every: int = 1
    on_host: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"EMA decay is {self.decay}: give a number from 0 up to, not including, 1")
        if self.every < 1:
            raise UserError(f"EMA every is {self.every}: give at least 1 (after every step)")

    @property
    def memory_kind(self) -> str | None:
        """Where it lies between steps (None: with the weights)."""
        return "pinned_host" if self.on_host else None

    def at_hand(self, average: Tree) -> Tree:
        """The average in the devices' memory; unused, it costs nothing."""
        return jax.device_put(average, jax.memory.Space.Device) if self.on_host else average

    def after(self, average: Tree, weights: Tree, step: Int[Array, ""], in_a_row: Int[Array, ""] | int = 0) -> Tree:
        """The average after the step with number `step` (from 0), where it lies.

        Args:
          in_a_row: steps that were skipped up to now. If only the last one was, there are others, since the average was
            moved, whose weights are to count; if all were, it is unchanged.
        """
        taken = jnp.asarray(in_a_row) < self.every
        decay = jnp.minimum(self.decay, (1.0 + step) / (10.0 + step)) ** self.every

        def moved(average: Tree) -> Tree:
            here = self.at_hand(average)
            new = jax.tree.map(lambda a, w: jnp.where(taken, a * decay + w * (1 - decay), a), here, weights)
            return jax.device_put(new, jax.memory.Space.Host) if self.on_host else new

        if self.every == 1:
            return moved(average)
        return jax.lax.cond((step + 1) % self.every == 0, moved, lambda average: average, average)
