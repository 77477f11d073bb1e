"""The loop around the step: places the weights, feeds batches, reads metrics one step late, saves, continues."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cpt_jax.checkpoint.train_state import Checkpoints
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.progress import Plan, progress
from cpt_jax.core.tree import Tree, flatten, partition, unflatten
from cpt_jax.data.loader import Loader
from cpt_jax.models.decoder import Network
from cpt_jax.models.quantised import quantise
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import Optimizer
from cpt_jax.optim.schedules import Schedule
from cpt_jax.sharding.placement import place as place_leaf
from cpt_jax.sharding.rules import RULES, replicated, shardings
from cpt_jax.training.loss import make_loss
from cpt_jax.training.metrics import MetricsFile
from cpt_jax.training.retention import Retention, start_of
from cpt_jax.training.state import TrainState, initial_state
from cpt_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """All that a stage of training needs, built: nothing here is looked up anywhere else."""

    name: str
    network: Network
    weights: Tree
    trains: Callable[[str], bool]
    loader: Loader
    optimizer: Optimizer
    schedule: Schedule
    ema: EMA | None
    steps: int
    accumulate: int
    precision: Precision
    mesh: Mesh
    directory: Path
    checkpoint_seconds: float
    retention: Sequence[Retention] = ()
    z_loss: float = 0.0


def _placed(training: Training) -> tuple[Tree, Tree, dict[str, NamedSharding]]:
    """(trainable float32, frozen in the compute type, shardings by path), each leaf where the rules put it."""
    network, mesh = training.network, training.mesh
    where = flatten(shardings(network.logical_axes, network.shapes, mesh))
    trainable, frozen = partition(training.weights, training.trains)
    if not trainable:
        raise UserError(f"stage {training.name!r}: the method trains none of the model's weights")

    flat, precision = flatten(trainable), training.precision
    placed = {path: place_leaf(leaf, jnp.float32, where[path]) for path, leaf in flat.items()}
    kept = {path: _frozen(leaf, path, precision, where[path]) for path, leaf in flatten(frozen).items()}
    return unflatten(placed), unflatten(kept), where


def _frozen(leaf: Any, path: str, precision: Precision, sharding: NamedSharding) -> Any:
    """A frozen leaf on its devices: in the compute type, or, of the layers' kernels, quantised."""
    placed = place_leaf(leaf, precision.dtype_of(path), sharding)
    if precision.frozen_kernels == "as computed" or not path.endswith("/kernel"):
        return placed
    return jax.jit(quantise, static_argnums=1, donate_argnums=0)(placed, precision.frozen_kernels)


def _state_shardings(state: TrainState, where: dict[str, NamedSharding], mesh: Mesh) -> TrainState:
    """Optimizer moments and the average lie as the weights whose path and shape they have; counters and factored
    moments, which are small, are everywhere."""
    shapes = {path: leaf.shape for path, leaf in flatten(state.trainable).items()}

    def place(keys, leaf):
        path = "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
        # optax.partition's own group names come first.
        while path and path not in shapes:
            path = path.partition("/")[2]
        return where[path] if shapes.get(path) == leaf.shape else replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def train(training: Training, plan: Plan | None = None) -> None:
    """Trains a stage to its end; a stage that was interrupted continues from its newest checkpoint, bit for bit.

    Writes `directory`/checkpoints and `directory`/metrics.jsonl.
    """
    mesh = training.mesh
    trainable, frozen, where = _placed(training)
    schedule = training.schedule.build(training.optimizer.learning_rate, training.steps)
    optimizer = training.optimizer.build(schedule, trainable)
    loss = make_loss(
        training.network,
        training.precision.dtype,
        training.trains,
        training.loader.names,
        retention=training.retention,
        steps=training.steps,
        z_loss=training.z_loss,
    )
    step = make_train_step(loss, optimizer, schedule, training.ema, training.accumulate)

    def begin(trainable: Tree) -> TrainState:
        return initial_state(trainable, optimizer, training.ema is not None)

    placement = _state_shardings(jax.eval_shape(begin, trainable), where, mesh)
    state = jax.jit(begin, out_shardings=placement)(trainable)
    start = start_of(trainable, training.retention)
    del trainable
    checkpoints = Checkpoints(training.directory / "checkpoints")
    if (found := checkpoints.restore(state)) is not None:
        state, loader_state = found
        training.loader.restore(loader_state)
    metrics_file = MetricsFile(training.directory / "metrics.jsonl", int(state.step))
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(placement, replicated(mesh)))
    try:
        with jax.set_mesh(mesh):
            _steps(training, compiled, state, (frozen, start), checkpoints, metrics_file, plan)
    finally:
        metrics_file.close()
        checkpoints.close()


def _steps(
    training,
    compiled,
    state,
    fixed: tuple[Tree, Tree],
    checkpoints: Checkpoints,
    metrics_file: MetricsFile,
    plan: Plan | None,
) -> None:
    batches = NamedSharding(training.mesh, PartitionSpec(RULES["batch"]))
    first = int(state.step)
    waiting: tuple[int, dict[str, jax.Array], int] | None = None
    last_read = last_save = time.monotonic()
    loader_state = training.loader.state()
    with progress(training.name, training.steps, "steps", plan, first) as shown:

        def read(step: int, metrics: dict[str, jax.Array], tokens: int) -> None:
            nonlocal last_read
            host = jax.device_get(metrics)
            now = time.monotonic()
            line = _line(step, host, training.loader.names, tokens, now - last_read)
            last_read = now
            metrics_file.write(line)
            if line["skipped_in_a_row"] >= training.optimizer.max_skipped:
                raise UserError(
                    f"{training.name}: {line['skipped_in_a_row']} steps in a row had a gradient that is not finite or far too large (step {step}): lower the learning rate, or look at the data there"
                )
            shown.advance(1, loss=line["loss"], tokens_per_second=line["tokens_per_second"])

        for number in range(first + 1, training.steps + 1):
            batch = next(training.loader)
            loader_state = training.loader.state()
            tokens = int(batch["weights"].sum())
            placed = {name: jax.make_array_from_process_local_data(batches, array) for name, array in batch.items()}
            state, metrics = compiled(state, *fixed, placed)
            # The step just dispatched runs while the one before it is read and the next batch is made.
            if waiting is not None:
                read(*waiting)
            waiting = (number, metrics, tokens)
            if time.monotonic() - last_save > training.checkpoint_seconds:
                # A checkpoint's own metrics are on disk before it is: a killed run loses no line.
                read(*waiting)
                waiting = None
                checkpoints.save(state, loader_state)
                last_save = time.monotonic()
        if waiting is not None:
            read(*waiting)
    checkpoints.save(state, loader_state)
    checkpoints.wait()


def _line(step: int, metrics: dict, names: tuple[str, ...], tokens: int, seconds: float) -> dict[str, float]:
    by_domain = {
        f"{kind}/{name}": float(value / count)
        for kind in ("nats", "divergence")
        for name, value, count in zip(names, metrics.get(kind, ()), metrics["tokens"], strict=False)
        if count > 0
    }
    return {
        "step": step,
        "loss": float(metrics["loss"]),
        **by_domain,
        "learning_rate": float(metrics["learning_rate"]),
        "gradient_norm": float(metrics["gradient_norm"]),
        "skipped": int(metrics["skipped"]),
        "skipped_in_a_row": int(metrics["skipped_in_a_row"]),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
    }
