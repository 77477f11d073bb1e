"""The loop around the step: places the weights, feeds batches, reads metrics one step late, saves, continues."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cpt_jax.checkpoint.keep import Keep
from cpt_jax.checkpoint.stored import StoredCheckpoints
from cpt_jax.checkpoint.train_state import Checkpoints, read_trained
from cpt_jax.core.errors import UserError
from cpt_jax.core.journal import Journal
from cpt_jax.core.precision import Precision
from cpt_jax.core.progress import Plan, progress, say
from cpt_jax.core.tree import Tree, flatten, partition, unflatten
from cpt_jax.data.loader import Loader
from cpt_jax.models.decoder import Network
from cpt_jax.models.quantised import quantise
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import Optimizer
from cpt_jax.optim.schedules import Schedule
from cpt_jax.sharding.hardware import peak_flops
from cpt_jax.sharding.placement import place as place_leaf
from cpt_jax.sharding.placement import spread
from cpt_jax.sharding.rules import RULES
from cpt_jax.training.flops import token_flops
from cpt_jax.training.guard import HANG_SECONDS, Preemption, Watchdog, agreed
from cpt_jax.training.metrics import MetricsFile, StepClock, metrics_line
from cpt_jax.training.profile import Profile, ProfiledSteps
from cpt_jax.training.program import Program, Settings
from cpt_jax.training.retention import Anchor, MeanTeacher, Retention, start_of, teacher_weight
from cpt_jax.training.state import TrainState
from cpt_jax.training.step import Controls


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
    seed: int = 0
    profiled: ProfiledSteps | None = None
    keep: Keep = Keep()
    hang_seconds: float | None = HANG_SECONDS
    journal: Journal = dataclasses.field(default_factory=Journal)
    stored: StoredCheckpoints | None = None

    def settings(self) -> Settings:
        """What is compiled into its step."""
        paths = frozenset(path for path in flatten(self.weights) if self.trains(path))
        if not paths:
            raise UserError(f"stage {self.name!r}: the method trains none of the model's weights")
        return Settings(
            network=self.network,
            trains=paths,
            names=self.loader.names,
            optimizer=self.optimizer,
            ema=self.ema,
            accumulate=self.accumulate,
            compute=self.precision.compute,
            retention=tuple(self.retention),
            z_loss=self.z_loss,
            mesh=self.mesh,
        )

    def program(self) -> Program:
        return self.settings().program()

    def controls(self) -> Callable[[int], Controls]:
        """What the step with a number (from 0) is given."""
        rate, seed = self.schedule.build(self.optimizer.learning_rate, self.steps), np.uint32(self.seed)

        def controls(step: int) -> Controls:
            taught = teacher_weight(self.retention, step, self.steps)
            return Controls(np.float32(rate(step)), np.float32(taught), seed)

        return controls

    def flops(self, sequence_length: int) -> float:
        """Model FLOPs a token."""
        teacher: Literal["average", "start"] | None = None
        if any(isinstance(part, MeanTeacher | Anchor) for part in self.retention):
            teacher = "average" if any(isinstance(part, MeanTeacher) for part in self.retention) else "start"
        return token_flops(self.network, self.trains, sequence_length, teacher=teacher).total

    def peak_flops(self) -> float | None:
        """Of all devices together, FLOP/s, where it is known for the type of the products."""
        one = peak_flops(self.mesh.devices.flat[0].device_kind) if self.precision.compute == "bfloat16" else None
        return None if one is None else one * self.mesh.size


def place_weights(
    weights: Tree, trains: Callable[[str], bool], precision: Precision, where: dict[str, NamedSharding]
) -> tuple[Tree, Tree]:
    """(trainable float32, frozen in the compute type), each leaf where the rules put it."""
    trainable, frozen = (flatten(part) for part in partition(weights, trains))
    placed = {path: place_leaf(leaf, jnp.float32, where[path]) for path, leaf in trainable.items()}
    kept = {path: _frozen(leaf, path, precision, where[path]) for path, leaf in frozen.items()}
    return unflatten(placed), unflatten(kept)


def _frozen(leaf: Any, path: str, precision: Precision, sharding: NamedSharding) -> Any:
    """A frozen leaf on its devices: in the compute type, or, of the layers' kernels, quantised."""
    placed = place_leaf(leaf, precision.dtype_of(path), sharding)
    if precision.frozen_kernels == "as computed" or not path.endswith("/kernel"):
        return placed
    return jax.jit(quantise, static_argnums=1, donate_argnums=0)(placed, precision.frozen_kernels)


def train(training: Training, plan: Plan | None = None) -> dict[str, Tree]:
    """Trains a stage to its end; a stage that was interrupted continues from its newest checkpoint, bit for bit.

    Writes `directory`/checkpoints and `directory`/metrics.jsonl, and returns what `read_trained` would read there.

    Raises:
      Preempted: it was asked to end, and has saved where it is.
    """
    if jax.process_index() > 0:
        training = dataclasses.replace(training, journal=Journal())
    program = training.program()
    trainable, frozen = place_weights(training.weights, training.trains, training.precision, program.where)
    state = program.begin(trainable)
    start = start_of(trainable, training.retention)
    del trainable
    checkpoints = Checkpoints(training.directory / "checkpoints", training.keep, training.stored)
    if (found := checkpoints.restore(state)) is not None:
        state, loader_state = found
        training.loader.restore(loader_state)
    attendants = _Attendants(training, checkpoints, int(state.step))
    try:
        with jax.set_mesh(training.mesh), attendants.preemption, attendants.watchdog:
            state = _steps(training, program, state, (frozen, start), attendants, plan)
    finally:
        attendants.close()
    if jax.process_count() > 1:
        if training.stored is not None:
            training.stored.fetch()
        return read_trained(training.directory / "checkpoints")
    trained = {"last": state.trainable} | ({} if state.average is None else {"ema": state.average})
    return jax.tree.map(np.asarray, trained)


class _Attendants:
    """What goes along with the steps of a stage that has done `first` of them."""

    def __init__(self, training: Training, checkpoints: Checkpoints, first: int) -> None:
        self.checkpoints = checkpoints
        self.metrics_file = MetricsFile(training.directory / "metrics.jsonl", first)
        self.profile = Profile(training.profiled, training.directory / "profile")
        self.preemption, self.watchdog = Preemption(), Watchdog(training.name, training.hang_seconds)
        again = self.metrics_file.dropped
        if first or again:
            after = f"continues after step {first}" if first else "begins anew"
            rest = f"; steps {first + 1} to {again[-1]['step']} are computed again" if again else ""
            say(f"{training.name}: {after}{rest}")
        compiling = sum(line["compile_seconds"] for line in again)
        lost = sum(line["seconds"] for line in again) - compiling
        training.journal.write(
            "training", station=training.name, first=first + 1, lost_seconds=lost, compile_seconds=compiling
        )

    def close(self) -> None:
        self.profile.close()
        self.metrics_file.close()
        self.checkpoints.close()


def _steps(
    training: Training,
    program: Program,
    state: TrainState,
    fixed: tuple[Tree, Tree],
    attendants: _Attendants,
    plan: Plan | None,
) -> TrainState:
    checkpoints, profile, loader = attendants.checkpoints, attendants.profile, training.loader
    batches = NamedSharding(training.mesh, PartitionSpec(RULES["batch"], RULES["sequence"]))
    first, controls = int(state.step), training.controls()
    waiting: tuple[int, dict[str, jax.Array]] | None = None
    clock, last_save = StepClock(), time.monotonic()
    loader_state, losses = loader.state(), []
    flops, peak = training.flops(loader.sequence_length), training.peak_flops()
    with progress(training.name, training.steps, "steps", plan, first) as shown:

        def read(step: int, metrics: dict[str, jax.Array]) -> None:
            host = jax.device_get(metrics)
            line = metrics_line(step, host, loader.names, clock.lap(), flops, peak, loader.unreadable())
            attendants.watchdog.beat()
            attendants.metrics_file.write(line)
            losses.append(line["loss"])
            _refuse_many_bad_steps(training, line)
            rates = {name: line[name] for name in ("tokens_per_second", "mfu") if name in line}
            shown.advance(1, loss=line["loss"], **rates)

        for number in range(first + 1, training.steps + 1):
            profile.before(number)
            with clock.of("data"):
                batch = next(loader)
                loader_state = loader.state()
                placed = {name: spread(array, batches) for name, array in batch.items()}
            with clock.of("compile") if number == first + 1 else contextlib.nullcontext():
                state, metrics = program.step(state, *fixed, placed, controls(number - 1))
            profile.after(number, metrics)
            # The step just dispatched runs while the one before it is read and the next batch is made.
            if waiting is not None:
                read(*waiting)
            waiting = (number, metrics)
            checkpoints.check()
            preempted = attendants.preemption.after(number)
            if preempted or agreed(number, time.monotonic() - last_save > training.checkpoint_seconds):
                # A checkpoint's own metrics are on disk before it is: a killed run loses no line.
                read(*waiting)
                waiting = None
                with clock.of("checkpoint"):
                    checkpoints.save(state, loader_state, float(np.mean(losses)))
                last_save = time.monotonic()
                losses.clear()
            if preempted:
                _wait_for(checkpoints, training, "preempted")
                raise attendants.preemption.ended(training.name, number)
        if waiting is not None:
            read(*waiting)
    checkpoints.save(state, loader_state, float(np.mean(losses or [np.nan])))
    _wait_for(checkpoints, training, "trained")
    return state


def _refuse_many_bad_steps(training: Training, line: dict[str, float]) -> None:
    if line["skipped_in_a_row"] >= training.optimizer.max_skipped:
        raise UserError(
            f"{training.name}: {line['skipped_in_a_row']} steps in a row had a gradient that is not finite or far too large (step {line['step']}): lower the learning rate, or look at the data there"
        )


def _wait_for(checkpoints: Checkpoints, training: Training, event: str) -> None:
    started = time.monotonic()
    checkpoints.wait()
    training.journal.write(event, station=training.name, checkpoint_seconds=time.monotonic() - started)
