"""A sweep's runs are the single runs, however they are brought through; what is done is not done again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import environment
from inputs import chinese, english, write_jsonl
from tensorboard.backend.event_processing import event_accumulator

from cpt_jax.core.errors import UserError
from cpt_jax.recipe.experiment import named_runs
from cpt_jax.recipe.find import find_recipe
from cpt_jax.recipe.run import run
from cpt_jax.sweep import groups, queues
from cpt_jax.sweep.groups import groups_of
from cpt_jax.sweep.sweep import Manner, Pace, sweep

pytestmark = pytest.mark.slow
# Each is saved.
STEPS = 16
EXPERIMENT = """
import dataclasses
from cpt_jax.adapt import LoRA
from cpt_jax.core.precision import Precision
from cpt_jax.data.holdout import Holdout
from cpt_jax.data.sources import Corpus
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.recipe.recipe import *

def one(name="one", share=0.25, rate=1e-2, seed=0, **changes) -> Recipe:
    held = Holdout(share=0.2, max_bytes=2000)
    stage = Stage(
        name="lora", method=LoRA(rank=4, alpha=8, new_rows=False), mixture={{"zh": 1 - share, "en": share}}, tokens={steps} * 256,
        batch_size=4, sequence_length=64, optimizer=AdamW(learning_rate=rate), ema=EMA(decay=0.9), checkpoint_seconds=0.0,
    )
    return Recipe(
        name=name, base={base!r}, seed=seed, precision=Precision(compute="float32"),
        domains=tuple(
            Domain(corpus=Corpus(name=name, spec=name + ".jsonl"), role=role, heldout=held)
            for name, role in (("zh", "new"), ("en", "replay"))
        ),
        stages=(dataclasses.replace(stage, **changes),), evaluation=Evaluation(sequence_length=64),
    )

def three() -> list[Recipe]:
    return [one("quarter"), one("half", 0.5, 3e-3, 1), one("most", 0.75, 1e-3, 2)]

def two_and_a_bad_one() -> dict[str, Recipe]:
    bad = AdamW(learning_rate=1e30, max_skipped=2)
    return dict(
        good=one(checkpoint_seconds=60.0),
        bad=one(optimizer=bad, checkpoint_seconds=60.0),
        other=one(share=0.5, seed=3, checkpoint_seconds=60.0),
    )

def nothing() -> list[Recipe]:
    return []
"""


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    write_jsonl(root / "zh.jsonl", chinese(200))
    write_jsonl(root / "en.jsonl", english(150))
    shutil.copytree(tiny_model, root / "base")
    (root / "swept.py").write_text(EXPERIMENT.format(base=str(root / "base"), steps=STEPS))
    return root


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))


@pytest.fixture(scope="module")
def single(place):
    """The third run, by itself."""
    here = Path.cwd()
    os.chdir(place)
    try:
        run(find_recipe("swept:three/most"), Path("single"), only="train")
    finally:
        os.chdir(here)
    return place / "single"


def scores(directory):
    entries = json.loads((directory / "eval.json").read_text())
    return {(entry["stage"], entry["weights"], entry["domain"]): entry["bits_per_byte"] for entry in entries}


def same_run(found, expected):
    """Everything but times: what was learnt, read and written where."""
    names = [
        sorted(
            str(path.relative_to(root))
            for path in root.rglob("*")
            # Checkpoints but the last, which is there in any case, follow from the time, and so do the names of their chunks.
            if path.is_file() and not {"checkpoints", "tensorboard"} & {*path.parts}
        )
        for root in (found, expected)
    ]
    assert (found / f"stages/1-lora/checkpoints/{STEPS}").exists()
    assert names[0] == names[1]
    assert scores(found) == pytest.approx(scores(expected), rel=1e-5)
    losses = [
        [json.loads(line)["loss"] for line in (root / "stages/1-lora/metrics.jsonl").read_text().splitlines()]
        for root in (found, expected)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert json.loads((found / "config.json").read_text()) == json.loads((expected / "config.json").read_text())


def test_runs_together_killed_and_continued_are_the_single_ones(place, single, capsys):
    words = ["sweep", "swept:three", "--workdir", "killed", "--together", "3", "--track", "tensorboard"]
    command = [sys.executable, "-m", "cpt_jax", *words]
    killed = subprocess.Popen(command, env=environment(place), stderr=subprocess.DEVNULL)
    stages = [place / "killed/runs" / name / "stages/1-lora" for name in ("quarter", "half", "most")]
    until = time.monotonic() + 300
    while not all((stage / "checkpoints/1").exists() for stage in stages) and time.monotonic() < until:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (stages[2] / f"checkpoints/{STEPS}").exists()
    # One of them goes on by itself, the others together.
    run(find_recipe("swept:three/quarter"), Path("killed/runs/quarter"), only="train")
    manner = Manner(together=3, track=("tensorboard",))
    assert sweep("swept:three", Path("killed"), manner, json_path=Path("figures.json"))
    same_run(place / "killed/runs/most", single)
    for name in ("half", "most"):
        found = event_accumulator.EventAccumulator(str(place / "killed/runs" / name / "tensorboard/stage-lora"))
        found.Reload()
        assert [event.step for event in found.Scalars("loss")] == list(range(1, STEPS + 1))
    events = (place / "killed/runs/half/events.jsonl").read_text()
    assert '"together": 3' in events
    assert '"together": 2' in events
    table = capsys.readouterr().out
    assert "base" in table
    assert "most" in table
    assert (place / "killed/report.html").exists()
    figures = json.loads(Path("figures.json").read_text())
    assert [record["status"] for record in figures["runs"]] == ["done"] * 3
    assert figures["runs"][2]["final"] == pytest.approx(
        {domain: value for (stage, kind, domain), value in scores(single).items() if (stage, kind) == ("lora", "last")},
        rel=1e-5,
    )
    # What they have in common is there once, and nothing of what is done is done again.
    for name in (
        "evaluations/base-last.json",
        "data/zh/manifest.json",
        "data/zh/heldout.jsonl",
        "base/model.safetensors",
    ):
        assert len({(place / "killed/runs" / run / name).stat().st_ino for run in ("quarter", "half", "most")}) == 1, (
            name
        )
    before = (place / "killed/runs/most/events.jsonl").read_text()
    assert sweep("swept:three", Path("killed"), Manner())
    assert (place / "killed/runs/most/events.jsonl").read_text() == before


def test_a_failing_run_takes_no_other_along_one_by_one_or_together(place, capsys):
    for together in (1, 3):
        directory = Path(f"bad-{together}")
        assert not sweep("swept:two_and_a_bad_one", directory, Manner(together=together))
        records = {record["name"]: record for record in json.loads((directory / "sweep.json").read_text())["runs"]}
        assert {name: record["status"] for name, record in records.items()} == {
            "good": "done",
            "bad": "failed",
            "other": "done",
        }
        assert "lower the learning rate" in records["bad"]["error"]
        said = capsys.readouterr()
        assert "failed: " in said.out
        if together == 1:
            # Without an export nothing follows the last evaluation.
            (ends,) = {
                line.rpartition(", ")[2]
                for line in said.err.splitlines()
                if "lora-ema: " in line and "rows, 0 s" in line
            }
            assert ends == "whole run 0 s left"
    same_run(Path("bad-3/runs/other"), Path("bad-1/runs/other"))


def test_what_is_too_large_for_the_memory_goes_together_by_halves(place, single, monkeypatch, capsys):
    together, sizes = groups.train_together, []

    def of_two(trainings, *rest):
        sizes.append(len(trainings))
        if len(trainings) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 28.47GiB")
        return together(trainings, *rest)

    monkeypatch.setattr(groups, "train_together", of_two)
    assert sweep("swept:three", Path("large"), Manner(together=3))
    assert sizes == [3, 2]
    assert "3 runs together are too large" in capsys.readouterr().err
    records = json.loads(Path("large/sweep.json").read_text())["runs"]
    assert {record["name"]: record["together"] for record in records} == {"quarter": 1, "half": 2, "most": 2}
    same_run(place / "large/runs/most", single)


def test_what_goes_together():
    quarter, half, most = (find_recipe(f"swept:three/{name}") for name in ("quarter", "half", "most"))
    import swept

    other = {"steps": swept.one("steps", tokens=256), "wide": swept.one("wide", batch_size=8)}
    recipes = {"quarter": quarter, "half": half, "most": most, **other}
    assert groups_of(recipes, None) == [["quarter", "half", "most"], ["steps"], ["wide"]]
    assert groups_of(recipes, 2) == [["quarter", "half"], ["most"], ["steps"], ["wide"]]


def program(path: Path, *lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    path.chmod(0o755)


def test_a_queue_gets_a_job_for_each_run_once(place, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    calls = tmp_path / "calls.txt"
    program(
        tmp_path / "bin" / "sbatch",
        f'echo "$RECIPE $WORKDIR $COMMAND $CPT_SHARED $ARGUMENTS | $*" >> {calls}',
        f"wc -l < {calls}",
    )
    program(tmp_path / "bin" / "squeue", 'echo "$*" | grep -q jobs=2 && echo RUNNING', "exit 0")
    manner = Manner(queue="slurm", queue_arguments=("--time=1:00",), track=("wandb", "mlflow"))
    with pytest.raises(UserError, match="from the repository's directory"):
        sweep("swept:three", tmp_path / "queued", manner)
    launch = Path(__file__).parents[2] / "launch"
    monkeypatch.setattr(queues.Slurm, "file", launch / "slurm.sbatch")
    assert sweep("swept:three", tmp_path / "queued", manner)
    submitted = calls.read_text().splitlines()
    assert re.sub("-[0-9a-f]{8} ", " ", submitted[0]) == (
        f"{tmp_path}/queued/recipes/quarter.json {tmp_path}/queued/runs/quarter train {tmp_path}/queued/shared "
        f"--track wandb mlflow | "
        f"--parsable --job-name=cpt-quarter --nodes=1 --gpus-per-node=1 --ntasks-per-node=1 --time=1:00 {launch}/slurm.sbatch"
    )
    assert len(submitted) == 3
    # The second is still there; the others have come to nothing, and one was done meanwhile.
    run(find_recipe("swept:three/most"), tmp_path / "queued/runs/most", only="train")
    assert sweep("swept:three", tmp_path / "queued", manner)
    again = calls.read_text().splitlines()[3:]
    assert [line.split()[0] for line in again] == [f"{tmp_path}/queued/recipes/quarter.json"]
    records = json.loads((tmp_path / "queued/sweep.json").read_text())["runs"]
    assert [(record["status"], record["job"]) for record in records] == [
        ("queued", "4"),
        ("queued", "2"),
        ("done", "3"),
    ]


def test_machines_of_skypilot_get_a_directory_in_a_store(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(queues.SkyPilot, "file", Path(__file__).parents[2] / "launch" / "skypilot.yaml")
    calls = tmp_path / "calls.txt"
    program(tmp_path / "bin" / "sky", f'[ "$2" = queue ] || echo "$*" >> {calls}')
    with pytest.raises(UserError, match="s3://"):
        sweep("swept:three", tmp_path / "sky", Manner(queue="skypilot"))
    address = "memory://sweeps/three"
    assert sweep("swept:three", address, Manner(queue="skypilot", exports=True))
    first = re.sub("-[0-9a-f]{8} ", " ", calls.read_text().splitlines()[0])
    assert first.startswith("jobs launch --yes --detach-run --name cpt-quarter --num-nodes 1 --gpus H100:1 --env ")
    assert f"RECIPE={address}/recipes/quarter.json --env WORKDIR={address}/runs/quarter --env COMMAND=run" in first


def test_wrong_input_is_told_in_a_line(place, tmp_path, monkeypatch):
    import swept

    with pytest.raises(UserError, match="2 runs named 'one'"):
        named_runs([swept.one(), swept.one(seed=1)], "twice")
    with pytest.raises(UserError, match="returns no runs"):
        sweep("swept:nothing", tmp_path / "none", Manner())
    with pytest.raises(UserError, match="did you mean 'three'"):
        sweep("swept:thre", tmp_path / "none", Manner())
    with pytest.raises(UserError, match="has no run 'mots'"):
        find_recipe("swept:three/mots")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sweep.json").write_text('{"experiment": "swept:other", "runs": []}')
    with pytest.raises(UserError, match="belongs to the experiment 'swept:other'"):
        sweep("swept:three", tmp_path / "other", Manner())
    with pytest.raises(UserError, match="holds no sweep"):
        sweep("swept:three", place, Manner())
    with pytest.raises(UserError, match="leave out --together"):
        Manner(at_once=2, together=4)
    monkeypatch.setattr("cpt_jax.training.trackers.PACKAGES", {"wandb": {"no_such_module": "no-such-package"}})
    with pytest.raises(UserError, match="run `pip install no-such-package`"):
        Manner(track=("wandb",))
    Manner(track=("wandb",), queue="slurm")
    assert not (tmp_path / "none").exists()


def test_the_time_left_follows_from_the_tokens():
    import swept

    now = [0.0]
    recipes = [swept.one(tokens=100), swept.one(tokens=300)]
    pace = Pace(recipes, lambda: now[0])
    assert pace.left() == ""
    now[0] = 10.0
    pace.ended(recipes[0], failed=False)
    assert pace.left() == "; 30 s left"
    pace.ended(swept.one(tokens=200), failed=True)
    assert pace.left() == "; 10 s left"
