"""The train step: (state, frozen, batch) -> (state, metrics), pure."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from cpt_jax.core.tree import Tree, combine
from cpt_jax.optim.averaging import EMA
from cpt_jax.training.state import TrainState


def make_train_step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    ema: EMA | None,
    accumulate: int = 1,
) -> Callable[[TrainState, Tree, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """The step of one stage. Only `state.trainable` is differentiated: frozen weights have no gradient to be thrown
    away.

    The loss is the mean over the batch's weighted tokens. With `accumulate` > 1 the batch's rows are taken in that
    many parts, one after the other, whose sums are added before the mean: the same step, in less memory.
    """

    def objective(trainable: Tree, frozen: Tree, part: dict[str, Array]):
        return loss(combine(trainable, frozen), part)

    gradient = jax.value_and_grad(objective, has_aux=True)

    def sums(trainable: Tree, frozen: Tree, batch: dict[str, Array]):
        if accumulate == 1:
            return gradient(trainable, frozen, batch)
        parts = jax.tree.map(lambda rows: rows.reshape(accumulate, -1, *rows.shape[1:]), batch)
        one_part = jax.tree.map(lambda rows: rows[0], parts)
        shapes = jax.eval_shape(gradient, trainable, frozen, one_part)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(trainable, frozen, part)), None

        return jax.lax.scan(add, zeros, parts)[0]

    def train_step(state: TrainState, frozen: Tree, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        (total, metrics), gradients = sums(state.trainable, frozen, batch)
        count = jnp.maximum(metrics["tokens"].sum(), 1.0)
        gradients = jax.tree.map(lambda leaf: leaf / count, gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.trainable)
        trainable = cast(Tree, optax.apply_updates(state.trainable, updates))
        average = None if ema is None or state.average is None else ema.update(state.average, trainable, state.step)
        metrics = metrics | {
            "loss": total / count,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, trainable, optimizer_state, average), metrics

    return train_step
