"""The train step: (state, frozen, start, batch, controls) -> (state, metrics), pure."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt

from cpt_jax.core.tree import Tree, combine
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.skipping import skipped
from cpt_jax.training.retention import Held
from cpt_jax.training.state import TrainState


class Controls(NamedTuple):
    """What the host decides for one step. None of it is compiled in: stages, and runs of a sweep, that differ only in
    these share one program.

    The seed is what adapters' dropout follows from, together with the step.
    """

    learning_rate: Float[Array, ""] | np.float32
    teacher_weight: Float[Array, ""] | np.float32 = np.float32(0)
    seed: UInt[Array, ""] | np.uint32 = np.uint32(0)


Step = Callable[[TrainState, Tree, Tree, Mapping[str, Any], Controls], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    loss: Callable, optimizer: optax.GradientTransformation, ema: EMA | None, accumulate: int = 1
) -> Step:
    """The step of one stage. Only `state.trainable` is differentiated: frozen weights have no gradient to be thrown
    away.

    The loss is the mean over the batch's weighted tokens. With `accumulate` > 1 the batch's rows are taken in that
    many parts, one after the other, whose sums are added before the mean: the same step, in less memory; but for experts'
    balancing loss, which is of each part's own load. The loss is given a random key that follows from the seed, the step
    and the part, so that a run that was interrupted draws the same.

    `optimizer` makes directions of gradients; the step goes against them by the learning rate. A step that it skips
    (`optim.skipping`) changes the average as little as the weights. `start` is what `training.retention` keeps of the
    weights as the stage begins ({} where it needs none).
    """

    def objective(trainable: Tree, frozen: Tree, part: Mapping[str, Any], key: Array, held: Held):
        return loss(combine(trainable, frozen), part, key, held)

    gradient = jax.value_and_grad(objective, has_aux=True)

    def sums(trainable: Tree, frozen: Tree, batch: Mapping[str, Any], key: Array, held: Held):
        if accumulate == 1:
            return gradient(trainable, frozen, batch, key, held)
        parts = jax.tree.map(lambda rows: rows.reshape(accumulate, -1, *rows.shape[1:]), batch)
        one_part = jax.tree.map(lambda rows: rows[0], parts)
        shapes = jax.eval_shape(gradient, trainable, frozen, one_part, key, held)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def add(total, inputs):
            return jax.tree.map(jnp.add, total, gradient(trainable, frozen, *inputs, held)), None

        return jax.lax.scan(add, zeros, (parts, jax.random.split(key, accumulate)))[0]

    def train_step(
        state: TrainState, frozen: Tree, start: Tree, batch: Mapping[str, Any], controls: Controls
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(controls.seed), state.step)
        average = None if ema is None or state.average is None else ema.at_hand(state.average)
        held = Held(controls.teacher_weight, average or {}, start)
        (total, metrics), gradients = sums(state.trainable, frozen, batch, key, held)
        count = jnp.maximum(metrics["tokens"].sum(), 1.0)
        gradients = jax.tree.map(lambda leaf: leaf / count, gradients)
        directions, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.trainable)
        updates = jax.tree.map(lambda leaf: -controls.learning_rate * leaf, directions)
        trainable = cast(Tree, optax.apply_updates(state.trainable, updates))
        in_all, in_a_row = skipped(optimizer_state)
        if ema is not None and state.average is not None:
            average = ema.after(state.average, trainable, state.step, in_a_row)
        metrics = metrics | {
            "loss": total / count,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(controls.learning_rate, jnp.float32),
            "skipped": in_all,
            "skipped_in_a_row": in_a_row,
        }
        return TrainState(state.step + 1, trainable, optimizer_state, average), metrics

    return train_step
