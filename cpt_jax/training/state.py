"""What a step changes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from cpt_jax.core.tree import Tree


class TrainState(NamedTuple):
    """Step count (steps done), trainable weights (float32), optimizer state, and their moving average or None."""

    step: Int[Array, ""]
    trainable: Tree
    optimizer_state: Any
    average: Tree | None


def initial_state(trainable: Tree, optimizer: optax.GradientTransformation, with_average: bool) -> TrainState:
    """The state before the first step; the average starts at the weights."""
    average = jax.tree.map(jnp.copy, trainable) if with_average else None
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), average)
