import json
import math
import os
import subprocess
import sys
import threading
import time

import pytest

from cpt_jax.core.errors import UserError
from cpt_jax.training import trackers as written_by
from cpt_jax.training.metrics import MetricsFile
from cpt_jax.training.trackers import Trackers, Tracking, _earlier


def metrics(step):
    return {"step": step, "loss": 5.0 - step / 8, "nats/en": 4.0, "tokens": 100, "skipped": 0}


WATCHED = {"step": 4, "tokens": 400, "bits_per_byte": {"en": 1.5}, "average": {"en": 1.25}, "action": None}


def killed_and_continued(tracking, directory):
    """Eight steps, of which 5 and 6 were told, and are computed again after a kill."""
    directory.mkdir(exist_ok=True)
    for first, last in ((0, 6), (4, 8)):
        file = MetricsFile(directory / "metrics.jsonl", first)
        trackers = Trackers(tracking, "lora", directory)
        for step in range(first + 1, last + 1):
            file.write(metrics(step))
            trackers.log(metrics(step))
            if step == 4:
                (directory / "watch.jsonl").write_text(json.dumps(WATCHED) + "\n")
                trackers.log(WATCHED)
        file.close()
        trackers.close()


def test_tensorboard_has_each_step_once(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed (extra: trackers)")
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard, which reads, is not installed"
    )
    killed_and_continued(Tracking(kinds=("tensorboard",), run="r", directory=tmp_path), tmp_path / "stage")
    found = reader.EventAccumulator(str(tmp_path / "tensorboard" / "lora"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(n, 5.0 - n / 8) for n in range(1, 9)]
    assert [(event.step, event.value) for event in found.Scalars("bits_per_byte/en")] == [(4, 1.5)]
    assert "nats/en" in found.Tags()["scalars"]


# Its store's libraries warn of each other.
@pytest.mark.filterwarnings("default")
def test_mlflow_continues_its_run_without_doubled_steps(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (extra: trackers)")
    pytest.importorskip("sqlalchemy", reason="mlflow's sqlite store needs sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    killed_and_continued(Tracking(kinds=("mlflow",), run="r", directory=tmp_path), tmp_path / "stage")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("cpt_jax")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "r lora"
    assert run.info.status == "FINISHED"
    history = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 8
    assert history == {n: 5.0 - n / 8 for n in range(1, 9)}
    assert [metric.value for metric in client.get_metric_history(run.info.run_id, "average/en")] == [1.25]


def test_wandb_is_the_same_run_at_each_start(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed (extra: trackers)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    killed_and_continued(Tracking(kinds=("wandb",), run="r", directory=tmp_path), tmp_path / "stage")
    identity = json.loads((tmp_path / "stage" / "trackers.json").read_text())["wandb"]
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert all(identity in file.name and file.stat().st_size > 500 for file in files)


def told_at_once(tmp_path, kind, count=3):
    """Runs that go on together, each with losses of its own: [run][step]."""
    directories = [tmp_path / f"run-{number}" for number in range(count)]
    for directory in directories:
        directory.mkdir()
    trackers = []
    for directory in directories:
        trackers.append(Trackers(Tracking(kinds=(kind,), run=directory.name, directory=directory), "lora", directory))
        # The next one finds it open.
        opened = threading.Event()
        trackers[-1]._work.put(opened.set)
        assert opened.wait(60)
    # So many digits that no clock's reading beside them in a file has the same ones.
    told = [[1 + (10 * number + step) / 2**20 for step in range(1, 5)] for number in range(count)]
    for step in range(1, 5):
        for own, losses in zip(trackers, told, strict=True):
            own.log({"step": step, "loss": losses[step - 1]})
    for own in trackers:
        own.close()
    return directories, told


def test_wandb_holds_runs_that_go_on_together_apart(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed (extra: trackers)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    directories, told = told_at_once(tmp_path, "wandb")
    for directory, losses in zip(directories, told, strict=True):
        [file] = (directory / "wandb").glob("offline-run-*/*.wandb")
        # Its figures stand in it as JSON; the last may be written after the run was closed.
        until = time.monotonic() + 30
        while str(losses[-1]).encode() not in file.read_bytes() and time.monotonic() < until:
            time.sleep(0.05)
        found = [[str(loss).encode() in file.read_bytes() for loss in each] for each in told]
        assert found == [[other == directory] * 4 for other in directories]


@pytest.mark.filterwarnings("default")
def test_mlflow_holds_runs_that_go_on_together_apart(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (extra: trackers)")
    pytest.importorskip("sqlalchemy", reason="mlflow's sqlite store needs sqlalchemy")
    # One store for all, which the first of them makes.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'all.db'}")
    directories, told = told_at_once(tmp_path, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'all.db'}")
    for directory, losses in zip(directories, told, strict=True):
        run = client.get_run(json.loads((directory / "trackers.json").read_text())["mlflow"])
        assert run.info.run_name == f"{directory.name} lora"
        history = client.get_metric_history(run.info.run_id, "loss")
        assert [(metric.step, metric.value) for metric in history] == list(zip(range(1, 5), losses, strict=True))


def test_a_tracker_that_fails_is_left_out_and_said(tmp_path, monkeypatch, capsys):
    class Failing:
        def __init__(self, *_):
            pass

        def log(self, values, step):
            raise OSError("no network")

        def close(self):
            raise AssertionError("it is left out")

    monkeypatch.setattr("cpt_jax.training.trackers.TRACKERS", {"wandb": Failing})
    monkeypatch.setattr("cpt_jax.training.trackers.PACKAGES", {"wandb": {os.__name__: "wandb"}})
    trackers = Trackers(Tracking(kinds=("wandb",), run="r", directory=tmp_path), "lora", tmp_path)
    trackers.log(metrics(1))
    trackers.log(metrics(2))
    trackers.close()
    assert capsys.readouterr().err.count("no network") == 1


WITHOUT_NETWORK = """
import pathlib, sys, time
from cpt_jax.training import trackers
from cpt_jax.training.trackers import Trackers, Tracking

class Hanging:
    def __init__(self, *_): pass
    def log(self, values, step): {log}
    def close(self): time.sleep(1000)

trackers.PATIENCE = 0.5
trackers.TRACKERS, trackers.PACKAGES = {{"wandb": Hanging}}, {{"wandb": {{"os": "os"}}}}
here = pathlib.Path(sys.argv[1])
several = [Trackers(Tracking(kinds=("wandb",), run="r", directory=here), "lora", here) for _ in range(6)]
for each in several:
    for step in range(1, 4):
        each.log({{"step": step, "loss": 1.0}})
started = time.monotonic()
for each in several:
    each.end()
for each in several:
    each.close()
print(time.monotonic() - started)
"""


@pytest.mark.parametrize("log", ["pass", "time.sleep(1000)"], ids=["at its end", "from the first step on"])
def test_a_tracker_that_never_answers_keeps_no_run_from_its_end(tmp_path, log):
    program = [sys.executable, "-c", WITHOUT_NETWORK.format(log=log), str(tmp_path)]
    ended = subprocess.run(program, capture_output=True, text=True, check=True, timeout=120)
    assert float(ended.stdout) < 2.5, "several wait together"
    assert ended.stderr.count(f"Hanging has not answered for 0.5 s, and is left: all figures are in {tmp_path}") == 6


def test_a_slow_tracker_is_waited_for_as_long_as_it_answers(tmp_path, monkeypatch):
    told = []

    class Slow:
        def __init__(self, *_):
            pass

        def log(self, values, step):
            time.sleep(0.2)
            told.append(step)

        def close(self):
            told.append("closed")

    monkeypatch.setattr(written_by, "PATIENCE", 0.6)
    monkeypatch.setattr(written_by, "TRACKERS", {"wandb": Slow})
    monkeypatch.setattr(written_by, "PACKAGES", {"wandb": {os.__name__: "wandb"}})
    trackers = Trackers(Tracking(kinds=("wandb",), run="r", directory=tmp_path), "lora", tmp_path)
    for step in range(1, 8):
        trackers.log(metrics(step))
    trackers.close()
    assert told == [*range(1, 8), "closed"]


def test_packages_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(written_by.importlib.util, "find_spec", lambda module: module if module == "wandb" else None)
    needed = "mlflow-skinny, sqlalchemy, alembic: run `pip install mlflow-skinny sqlalchemy alembic`"
    with pytest.raises(UserError, match=f"--track mlflow needs {needed}"):
        Tracking(kinds=("wandb", "mlflow"), run="r", directory=tmp_path)
    # A server keeps its own store.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")
    with pytest.raises(UserError, match=r"run `pip install mlflow-skinny`$"):
        Tracking(kinds=("mlflow",), run="r", directory=tmp_path)


def test_what_was_no_number_is_told_as_such_at_the_next_start(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    (tmp_path / "watch.jsonl").write_text('{"step": 1, "bits_per_byte": {"en": null}, "action": null}\n')
    told = [written_by._values(line)[0] for line in _earlier(tmp_path)]
    assert [(list(each), math.isnan(*each.values())) for each in told] == [
        (["loss"], True),
        (["bits_per_byte/en"], True),
    ]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "watch.jsonl").write_text(json.dumps(WATCHED) + "\n" + '{"step": 8, "to')
    assert [line["step"] for line in _earlier(tmp_path)] == [4]
