"""TensorBoard, Weights & Biases and MLflow, fed from what goes to metrics.jsonl and watch.jsonl.

Each is optional, and none is trusted: what a run goes on from is its own files, and a tracker that fails costs nothing
but its figures.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import queue
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from cpt_jax.core import processes
from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import say
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.training.metrics import read_metrics
from cpt_jax.training.watch import read_watch

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
# What each is written by: modules, and the packages that they come in.
PACKAGES: dict[str, dict[str, str]] = {
    "tensorboard": {"tensorboardX": "tensorboardX"},
    "wandb": {"wandb": "wandb"},
    "mlflow": {"mlflow": "mlflow-skinny"},
}
# Seconds without an answer, at the end of a stage, after which what a tracker was not told is not told: W&B without a
# network tries for ever.
PATIENCE = 60.0
# MLflow's sqlite store needs more; a server does not.
SQLITE = {"sqlalchemy": "sqlalchemy", "alembic": "alembic"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tracking:
    """Where a run's figures go besides its own files: a tracker's run for each stage.

    TensorBoard's files are in `directory`/tensorboard; W&B and MLflow are configured by their own variables
    (WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI; without the last one `directory`/mlflow.db).

    Raises:
      UserError: a package is not installed.
    """

    kinds: tuple[TrackerName, ...]
    run: str
    directory: Path

    def __post_init__(self) -> None:
        check_packages(self.kinds)


def check_packages(kinds: Sequence[TrackerName]) -> None:
    """That trackers can be written.

    Raises:
      UserError: a package is not installed.
    """
    for kind in kinds:
        in_sqlite = kind == "mlflow" and os.environ.get("MLFLOW_TRACKING_URI", "sqlite:").startswith("sqlite:")
        needed = PACKAGES[kind] | (SQLITE if in_sqlite else {})
        missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise UserError(f"--track {kind} needs {', '.join(missing)}: run `pip install {' '.join(missing)}`")


class Tracker(Protocol):
    """One tracker's run: it is given the lines of earlier starts again, and then each new one."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The trackers of a stage, of which the first process writes; they are told in a thread of their own.

    Args:
      name: of the stage; directory: where it writes.
    """

    def __init__(self, tracking: Tracking | None, name: str, directory: Path) -> None:
        self._trackers: list[Tracker] = []
        self._directory, self._asked, self._answered = directory, "", 0.0
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ended: float | None = None
        if tracking is None or not tracking.kinds or not processes.is_first():
            return
        self._work.put(functools.partial(self._open, tracking, name, directory, _earlier(directory)))
        # The interpreter would wait at its end for one that is no daemon, as it does for a pool's.
        self._thread = threading.Thread(target=self._tell, name="trackers", daemon=True)
        self._thread.start()

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl or watch.jsonl."""
        if self._thread is not None:
            self._work.put(functools.partial(self._log, *_values(line)))

    def end(self) -> None:
        """Nothing more is to come; does not wait."""
        if self._thread is not None and self._ended is None:
            self._ended = time.monotonic()
            self._work.put(self._close)
            self._work.put(None)

    def close(self) -> None:
        """Returns when all of it was told, or no tracker has answered for `PATIENCE` seconds."""
        self.end()
        thread, self._thread = self._thread, None
        while thread is not None and self._ended is not None and thread.is_alive():
            thread.join(0.1)
            if thread.is_alive() and time.monotonic() - max(self._ended, self._answered) > PATIENCE:
                say(
                    f"{self._asked} has not answered for {PATIENCE:g} s, and is left: all figures are in {self._directory}"
                )
                return

    def _tell(self) -> None:
        for work in iter(self._work.get, None):
            work()

    def _ask(self, name: str, call: Callable[[], Any]) -> Any:
        self._asked = name
        try:
            return call()
        finally:
            self._answered = time.monotonic()

    def _open(self, tracking: Tracking, name: str, directory: Path, earlier: Sequence[Mapping[str, Any]]) -> None:
        for kind in tracking.kinds:
            try:
                self._trackers.append(self._ask(kind, lambda kind=kind: TRACKERS[kind](tracking, name, directory)))
            # Their network, their disk, their account: whatever it is, the training goes on.
            except Exception as error:
                say(f"{kind} is left out: {type(error).__name__}: {error}")
        for line in earlier:
            self._log(*_values(line))

    def _log(self, values: Mapping[str, float], step: int) -> None:
        for tracker in list(self._trackers):
            try:
                self._ask(type(tracker).__name__, lambda tracker=tracker: tracker.log(values, step))
            except Exception as error:
                self._trackers.remove(tracker)
                say(f"{type(tracker).__name__} is left out from step {step} on: {type(error).__name__}: {error}")

    def _close(self) -> None:
        for tracker in self._trackers:
            try:
                self._ask(type(tracker).__name__, tracker.close)
            except Exception as error:
                say(f"{type(tracker).__name__}: {type(error).__name__}: {error}")


def _values(line: Mapping[str, Any]) -> tuple[dict[str, float], int]:
    """(figures by name, step): what is by domain has the domain behind a slash."""
    flat: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{domain}": float(each) for domain, each in value.items()}
        elif name != "step" and isinstance(value, int | float):
            flat[name] = float(value)
    if "bits_per_byte" in line:
        flat.pop("tokens", None)
    return flat, line["step"]


def _earlier(directory: Path) -> list[dict[str, Any]]:
    """The lines of earlier starts, in the order of their steps."""
    return sorted([*read_metrics(directory), *read_watch(directory)], key=lambda line: line["step"])


class TensorBoard:
    """A directory of event files, written anew at each start: a reader finds each step once."""

    def __init__(self, tracking: Tracking, name: str, directory: Path) -> None:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        out = tracking.directory / "tensorboard" / name
        shutil.rmtree(out, ignore_errors=True)
        self._writer = SummaryWriter(str(out), flush_secs=10)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of W&B, continued under the same id; it leaves out steps that it has."""

    def __init__(self, tracking: Tracking, name: str, directory: Path) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        identity = _identity(directory, "wandb", lambda: uuid.uuid4().hex)
        config = tracking.directory / "config.json"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "cpt_jax"),
            name=f"{tracking.run} {name}",
            group=tracking.run,
            id=identity,
            resume="allow",
            # Beside those of other runs of a group.
            reinit="create_new",
            dir=str(tracking.directory),
            config=json.loads(config.read_text()) if config.exists() else None,
        )
        self._done = self._run.step - 1 if self._run.resumed else -1

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step > self._done:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, continued; what it has of a figure, up to some step, is not told again."""

    def __init__(self, tracking: Tracking, name: str, directory: Path) -> None:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]

        where = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{(tracking.directory / 'mlflow.db').absolute()}")
        self._client, self._metric = MlflowClient(where), Metric
        try:
            experiment = self._client.create_experiment("cpt_jax")
        except MlflowException:
            # It is there: asking first would leave time for another run to make it.
            found = self._client.get_experiment_by_name("cpt_jax")
            if found is None:
                raise
            experiment = found.experiment_id

        def create() -> str:
            return self._client.create_run(experiment, run_name=f"{tracking.run} {name}").info.run_id

        self._id = _identity(directory, "mlflow", create)
        self._done: dict[str, int] = {}

    def log(self, values: Mapping[str, float], step: int) -> None:
        new = [name for name in values if step > self._last(name)]
        now = int(time.time() * 1000)
        if new:
            self._client.log_batch(self._id, [self._metric(name, values[name], now, step) for name in new])

    def _last(self, name: str) -> int:
        """The last step that was there at the start."""
        if name not in self._done:
            history = self._client.get_metric_history(self._id, name)
            self._done[name] = max((metric.step for metric in history), default=-1)
        return self._done[name]

    def close(self) -> None:
        self._client.set_terminated(self._id)


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}


def _identity(directory: Path, kind: str, create: Any) -> str:
    """The tracker's own name of the stage's run, kept with the stage."""
    path = directory / "trackers.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if kind not in known:
        known[kind] = create()
        write_json_atomic(path, known)
    return known[kind]
