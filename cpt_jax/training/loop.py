"""The loop around the step: places the weights, feeds batches, reads metrics one step late, saves, continues."""

import contextlib
import dataclasses
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cpt_jax.checkpoint.stored import is_trained
from cpt_jax.checkpoint.train_state import Checkpoints, read_trained
from cpt_jax.core.errors import UserError
from cpt_jax.core.journal import Journal
from cpt_jax.core.progress import Plan, progress, say
from cpt_jax.core.tree import Tree
from cpt_jax.sharding.placement import spread
from cpt_jax.sharding.rules import RULES
from cpt_jax.training.ending import end_early, ended_at
from cpt_jax.training.guard import Preemption, Watchdog, agreed
from cpt_jax.training.memory import told_of_memory
from cpt_jax.training.metrics import MetricsFile, StepClock, metrics_line
from cpt_jax.training.profile import Profile
from cpt_jax.training.program import Program
from cpt_jax.training.retention import start_of
from cpt_jax.training.state import TrainState
from cpt_jax.training.trackers import Trackers
from cpt_jax.training.training import Training, place_weights
from cpt_jax.training.watch import Watcher


def train(training: Training, plan: Plan | None = None) -> dict[str, Tree]:
    """Trains a stage to its end; a stage that was interrupted continues from its newest checkpoint, bit for bit.

    Writes `directory`/checkpoints and `directory`/metrics.jsonl, and returns what `read_trained` would read there.

    Raises:
      Preempted: it was asked to end, and has saved where it is.
      UserError: it does not fit into a device's memory.
    """
    with told_of_memory(training.name, training.memory):
        return _train(training, plan)


def _train(training: Training, plan: Plan | None) -> dict[str, Tree]:
    if jax.process_index() > 0:
        training = dataclasses.replace(training, journal=Journal())
    program = training.program()
    trainable, frozen = place_weights(training.weights, training.trains, training.precision, program.where)
    start = start_of(trainable, training.retention)
    checkpoints = Checkpoints(training.directory / "checkpoints", training.keep, training.stored)
    # Beside one that is restored, a state that is begun would take its memory again.
    if (found := checkpoints.restore(program.like(trainable))) is not None:
        state, loader_state = found
        training.loader.restore(loader_state)
    else:
        state = program.begin(trainable)
    del trainable
    over = ended_at(training.directory, int(state.step))
    attendants = _Attendants(training, checkpoints, int(state.step))
    try:
        with jax.set_mesh(training.mesh), attendants.preemption, attendants.watchdog:
            if not over:
                state = _Steps(training, program, state, (frozen, start), attendants).run(plan)
    finally:
        attendants.close()
    if jax.process_count() > 1:
        if training.stored is not None:
            training.stored.fetch(is_trained)
        return read_trained(training.directory / "checkpoints")
    trained = {"last": state.trainable} | ({} if state.average is None else {"ema": state.average})
    return jax.tree.map(np.asarray, trained)


class _Attendants:
    """What goes along with the steps of a stage that has done `first` of them."""

    def __init__(self, training: Training, checkpoints: Checkpoints, first: int) -> None:
        self.checkpoints = checkpoints
        self.metrics_file = MetricsFile(training.directory / "metrics.jsonl", first)
        self.watcher = Watcher(training.watching, training.mesh, training.directory, first)
        self.trackers = Trackers(training.tracking, training.name, training.directory)
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
        self.trackers.close()
        self.metrics_file.close()
        self.checkpoints.close()


class _Steps:
    """The steps of a stage from `state` on.

    Args:
      fixed: the frozen weights, and what is kept of the start.
    """

    def __init__(
        self, training: Training, program: Program, state: TrainState, fixed: tuple[Tree, Tree], attendants: _Attendants
    ) -> None:
        self._training, self._program, self._fixed, self._attendants = training, program, fixed, attendants
        self.state, self._first = state, int(state.step)
        self._loader_state, self._losses = training.loader.state(), []
        self._clock, self._last_save = StepClock(), time.monotonic()
        self._waiting: tuple[int, dict[str, jax.Array], dict[str, float]] | None = None
        self._why: str | None = None
        self._flops, self._peak = training.flops(training.loader.sequence_length), training.peak_flops()

    def run(self, plan: Plan | None) -> TrainState:
        """To the end; or to the step at which it is asked to end, or at which the watch or the text end it."""
        training, attendants = self._training, self._attendants
        controls = training.controls()
        with progress(training.name, training.steps, "steps", plan, self._first) as self._shown:
            if self._first == 0 and attendants.watcher.due(0, training.steps):
                self._watch(0)
            for number in range(self._first + 1, training.steps + 1):
                attendants.profile.before(number)
                if (batch := self._batch()) is None:
                    self._end_of_text(number - 1)
                    break
                with self._clock.of("compile") if number == self._first + 1 else contextlib.nullcontext():
                    self.state, metrics = self._program.step(self.state, *self._fixed, batch, controls(number - 1))
                attendants.profile.after(number, metrics)
                # The step just dispatched runs while the one before it is read and the next batch is made.
                self._read()
                self._waiting = (number, metrics, training.loader.epochs())
                self._after(number)
                if self._why is not None:
                    break
            self._read()
        self._save()
        _wait_for(attendants.checkpoints, training, "trained")
        return self.state

    def _batch(self) -> dict[str, jax.Array] | None:
        mesh, loader = self._training.mesh, self._training.loader
        where = NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["sequence"]))
        with self._clock.of("data"):
            if (batch := next(loader, None)) is None:
                return None
            self._loader_state = loader.state()
            return {name: spread(array, where) for name, array in batch.items()}

    def _read(self) -> None:
        """The metrics of the step that is waited for."""
        if self._waiting is None:
            return
        (step, metrics, epochs), self._waiting = self._waiting, None
        loader, host = self._training.loader, jax.device_get(metrics)
        line = metrics_line(
            step, host, loader.names, self._clock.lap(), self._flops, self._peak, loader.unreadable(), epochs
        )
        self._attendants.watchdog.beat()
        self._attendants.metrics_file.write(line)
        self._attendants.trackers.log(line)
        self._losses.append(line["loss"])
        if (error := self._training.refusal(line)) is not None:
            raise error
        rates = {name: line[name] for name in ("tokens_per_second", "mfu") if name in line}
        losses = {f"loss {name}": line[f"nats/{name}"] for name in loader.names if f"nats/{name}" in line}
        self._shown.advance(1, loss=line["loss"], **(losses if len(losses) > 1 else {}), **rates)

    def _after(self, number: int) -> None:
        """What there is to do between two steps."""
        training, checkpoints = self._training, self._attendants.checkpoints
        checkpoints.check()
        preempted = self._attendants.preemption.after(number)
        saving = preempted or agreed(number, time.monotonic() - self._last_save > training.checkpoint_seconds)
        watching = self._attendants.watcher.due(number, training.steps)
        if saving or watching:
            # A checkpoint's own metrics are on disk before it is: a killed run loses no line.
            self._read()
        if watching:
            self._watch(number)
        if saving:
            with self._clock.of("checkpoint"):
                self._save()
        if preempted:
            _wait_for(checkpoints, training, "preempted")
            raise self._attendants.preemption.ended(training.name, number)

    def _watch(self, number: int) -> None:
        with self._clock.of("watch"):
            line, why = self._attendants.watcher.look(
                self.state, self._fixed[0], self._training.loader, self._attendants.metrics_file.tokens
            )
        self._attendants.trackers.log(line)
        self._attendants.watchdog.beat()
        # Shares that were raised are a part of it.
        self._loader_state = self._training.loader.state()
        if why is not None:
            self._end(number, why)

    def _end_of_text(self, number: int) -> None:
        if number == 0:
            raise UserError(
                f"{self._training.name}: there is no text for a first step: no document of its mixture can be used (they cannot "
                'be read, or are longer than a row and left out): give longer rows, or long_documents="split"'
            )
        self._end(number, "all text was read as often as max_epochs allows")
        self._read()
        watcher = self._attendants.watcher
        if watcher.due(number, number) and not watcher.due(number, self._training.steps):
            self._watch(number)

    def _end(self, number: int, why: str) -> None:
        self._why = why
        if number < self._training.steps:
            say(f"{self._training.name}: ends after step {number} of {self._training.steps}: {why}")
            end_early(self._training.directory, number, why)

    def _save(self) -> None:
        self._attendants.checkpoints.save(self.state, self._loader_state, float(np.mean(self._losses or [np.nan])))
        self._last_save = time.monotonic()
        self._losses.clear()


def _wait_for(checkpoints: Checkpoints, training: Training, event: str) -> None:
    started = time.monotonic()
    checkpoints.wait()
    training.journal.write(event, station=training.name, checkpoint_seconds=time.monotonic() - started)
