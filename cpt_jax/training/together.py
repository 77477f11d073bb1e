"""Several stages that one program can train, trained as one: `jax.vmap` of the step over their states, batches and
controls. Each writes the checkpoints and the metrics that it would write alone, and tells its trackers."""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cpt_jax.checkpoint.train_state import Checkpoints
from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import progress, say
from cpt_jax.core.tree import Tree
from cpt_jax.data.feed import Feed, Made
from cpt_jax.data.loader import Loader
from cpt_jax.sharding.placement import spread
from cpt_jax.sharding.rules import RULES
from cpt_jax.training.guard import Preemption, Watchdog
from cpt_jax.training.metrics import MetricsFile, StepClock, metrics_line
from cpt_jax.training.program import Settings, of_runs
from cpt_jax.training.stacked import Stack, joint_settings, stacked
from cpt_jax.training.trackers import Trackers
from cpt_jax.training.training import Training

# Saving holds all runs up: it takes no more than this share of the time.
SAVING_SHARE = 0.05


def train_together(
    trainings: Sequence[Training], makers: Sequence[Callable[[], Loader]], name: str = "together"
) -> list[dict[str, Tree] | Exception]:
    """Trains stages to their end, as `train` does each, and returns what it would return; for one that cannot go on,
    why.

    They may stand at different steps: they go on together until the first is at its end, and the rest after that.

    Args:
      makers: make the trainings' loaders again, in another process (picklable).

    Raises:
      Preempted: it was asked to end, and has saved where each is.
      UserError: one program does not do for all (see `joint_settings`).
    """
    settings = joint_settings(trainings)
    if settings is None:
        raise UserError(f"{name}: these stages differ in more than numbers: train them one by one")
    results: dict[int, dict[str, Tree] | Exception] = {}
    while left := [index for index in range(len(trainings)) if index not in results]:
        members: dict[int, _Member] = {}
        for index in left:
            try:
                members[index] = _Member(trainings[index], settings.names)
            # Its checkpoints are damaged, say: the others go on.
            except UserError as error:
                results[index] = error
        if not members:
            break
        group = _Group(list(members.values()), [makers[index] for index in members], settings, name)
        try:
            with jax.set_mesh(settings.mesh), group.preemption, group.watchdog:
                group.run()
        finally:
            group.close()
        places = list(members)
        results |= {places[number]: result for number, result in group.results.items()}
    return [results[index] for index in range(len(trainings))]


class _Member:
    """One run of a group: its files, and where it stands."""

    def __init__(self, training: Training, names: Sequence[str]) -> None:
        self.training = training
        self.checkpoints = Checkpoints(training.directory / "checkpoints", training.keep, training.stored)
        self.controls, self.error = training.controls(), None
        self.losses: list[float] = []
        self.step, self.metrics_file, self.trackers, self.loader_state = 0, None, None, None
        # The place of its domains among those of all.
        self.domains = np.array([names.index(name) for name in training.loader.names], np.int32)
        self.flops, self.peak = training.flops(training.loader.sequence_length), training.peak_flops()

    def begin(self, stack: Stack, index: int, settings: Settings, count: int) -> None:
        """Puts its newest checkpoint, if there is one, into the stack, and opens its files."""
        training = self.training
        if (found := self.checkpoints.restore(stack.like_one(settings))) is not None:
            state, self.loader_state = found
            stack.put(index, state)
            self.step = int(state.step)
        self.metrics_file = MetricsFile(training.directory / "metrics.jsonl", self.step)
        self.trackers = Trackers(training.tracking, training.name, training.directory)
        again = self.metrics_file.dropped
        compiling = sum(line["compile_seconds"] for line in again)
        lost = sum(line["seconds"] for line in again) - compiling
        training.journal.write(
            "training",
            station=training.name,
            first=self.step + 1,
            lost_seconds=lost,
            compile_seconds=compiling,
            together=count,
        )
        if self.step or again:
            say(f"{training.directory}: continues after step {self.step}")

    def write(self, step: int, metrics: dict[str, Any], lap: dict[str, float], made: Made) -> None:
        """A step's line, from its part of the group's metrics."""
        if self.error is not None:
            return
        own = metrics | {
            kind: metrics[kind][self.domains]
            for kind in ("nats", "divergence", "tokens", "positions")
            if kind in metrics
        }
        names = self.training.loader.names
        line = metrics_line(step, own, names, lap, self.flops, self.peak, made.unreadable, made.epochs)
        assert self.metrics_file is not None
        assert self.trackers is not None
        self.metrics_file.write(line)
        self.trackers.log(line)
        self.losses.append(line["loss"])
        self.error = self.training.refusal(line)

    def save(self, state: Any, loader_state: dict) -> None:
        if self.error is None:
            self.checkpoints.save(state, loader_state, float(np.mean(self.losses or [np.nan])))
            self.losses.clear()

    def wait(self, event: str) -> None:
        started = time.monotonic()
        self.checkpoints.wait()
        self.training.journal.write(event, station=self.training.name, checkpoint_seconds=time.monotonic() - started)

    def close(self) -> None:
        if self.trackers is not None:
            self.trackers.close()
        if self.metrics_file is not None:
            self.metrics_file.close()
        self.checkpoints.close()


class _Group:
    """Runs that go on together until the first is at its end."""

    def __init__(
        self, members: Sequence[_Member], makers: Sequence[Callable[[], Loader]], settings: Settings, name: str
    ) -> None:
        self.settings, self.name = settings, name
        self.members, self.makers = members, makers
        self.preemption = Preemption()
        self.watchdog = Watchdog(name, members[0].training.hang_seconds)
        self.results: dict[int, dict[str, Tree] | Exception] = {}
        self._feed: Feed | None = None
        rows = NamedSharding(settings.mesh, PartitionSpec(RULES["batch"], RULES["sequence"]))
        self._rows = of_runs(rows)

    def run(self) -> None:
        stack = stacked([member.training for member in self.members], self.settings)
        for index, member in enumerate(self.members):
            member.begin(stack, index, self.settings, len(self.members))
        steps = min(member.training.steps - member.step for member in self.members)
        self._feed = Feed(self.makers, [member.loader_state for member in self.members], self._stack_batches)
        self._steps(stack, steps)
        for index, member in enumerate(self.members):
            if member.error is not None:
                self.results[index] = member.error
                continue
            member.wait("trained")
            if member.step == member.training.steps:
                state = stack.one(index)
                trained = {"last": state.trainable} | ({} if state.average is None else {"ema": state.average})
                self.results[index] = jax.tree.map(np.asarray, trained)

    def _stack_batches(self, made: list[Made]) -> tuple[dict[str, jax.Array], list[Made]]:
        """One batch of all runs on the devices; of one whose data failed, zeros."""
        whole = next((each.batch for each in made if each.error is None), None)
        if whole is None:
            raise made[0].error or UserError(f"{self.name}: no data")
        parts = []
        for each, member in zip(made, self.members, strict=True):
            batch = {name: np.zeros_like(array) for name, array in whole.items()} if each.error else each.batch
            parts.append(batch | {"domains": member.domains[batch["domains"]]})
        return {name: spread(np.stack([part[name] for part in parts]), self._rows) for name in whole}, made

    def _steps(self, stack: Stack, steps: int) -> None:
        members, clock, feed = self.members, StepClock(), self._feed
        assert feed is not None
        waiting: Callable[[], None] | None = None
        every = min(member.training.checkpoint_seconds for member in members)
        next_save = time.monotonic() + every
        with progress(self.name, steps, "steps") as shown:

            def read(metrics: dict[str, jax.Array], numbers: list[int], made: list[Made]) -> None:
                host, lap = jax.device_get(metrics), clock.lap()
                self.watchdog.beat()
                for index, member in enumerate(members):
                    own = {name: value[index] for name, value in host.items()}
                    member.write(numbers[index], own, lap, made[index])
                shown.advance(1, loss=float(np.mean(host["loss"])))

            for number in range(1, steps + 1):
                with clock.of("data"):
                    batch, made = next(feed)
                for member, each in zip(members, made, strict=True):
                    member.error = member.error or each.error
                of_each = [member.controls(member.step) for member in members]
                controls = jax.tree.map(lambda *values: np.stack(values), *of_each)
                with clock.of("compile") if number == 1 else contextlib.nullcontext():
                    stack.state, metrics = stack.program.step(stack.state, stack.frozen, stack.start, batch, controls)
                for member in members:
                    member.step += 1
                # The step just dispatched runs while the one before it is read.
                if waiting is not None:
                    waiting()
                waiting = functools.partial(read, metrics, [member.step for member in members], made)
                preempted = self.preemption.after(number)
                if preempted or number == steps or time.monotonic() > next_save:
                    waiting()
                    waiting, began = None, time.monotonic()
                    with clock.of("checkpoint"):
                        self._save(stack, made)
                    took = time.monotonic() - began
                    next_save = time.monotonic() + max(every, took / SAVING_SHARE)
                if preempted:
                    for member in members:
                        member.wait("preempted")
                    raise self.preemption.ended(self.name, number)

    def _save(self, stack: Stack, made: list[Made]) -> None:
        for index, (member, each) in enumerate(zip(self.members, made, strict=True)):
            member.save(stack.one(index), each.state)

    def close(self) -> None:
        if self._feed is not None:
            self._feed.close()
        for member in self.members:
            # All at once: those that wait for a network wait together.
            if member.trackers is not None:
                member.trackers.end()
        for member in self.members:
            member.close()
