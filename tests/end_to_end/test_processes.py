"""A run by several processes is the run of one: the same losses on the same documents, by the same command."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
from commands import call, environment, go
from tiny_recipe import write_tiny

from cpt_jax.training.ending import ended_early

# A stage that its watch stops, and one whose watch raises replay.
WATCHED = """
import dataclasses
from recipes import tiny
from cpt_jax.adapt import Full
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.recipe.recipe import *

def watched() -> Recipe:
    whole = tiny()
    changes = dict(method=Full(), ema=None, optimizer=AdamW(learning_rate=3e-2), tokens=12 * 512)
    stage = dataclasses.replace(whole.stages[1], **changes)
    def with_watch(name, budget):
        watch = Watch(every=3, max_bytes=1000, budget=budget)
        return dataclasses.replace(stage, name=name, mixture={"zh": 0.98, "en": 0.02}, watch=watch)
    stopped = with_watch("stopped", Stop(limit=0.01))
    raised = with_watch("raised", RaiseReplay(limit=0.01, factor=20.0))
    return dataclasses.replace(whole, vocabulary=None, stages=(stopped, raised))
"""

# Of the two stages; several processes ask each other every eighth.
STEPS = (5, 9)


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    write_tiny(root, tiny_model)
    (root / "watching.py").write_text(WATCHED)
    return root


def run(
    place, name: str, processes: int, devices: int, mesh: str, command: str = "run", recipe: str = "recipes:tiny"
) -> list[subprocess.CompletedProcess]:
    """By so many processes of so many devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    start = [sys.executable, "-m", "cpt_jax", command, recipe, "--workdir", name, "--mesh", mesh]
    if recipe == "recipes:tiny":
        start += ["--stages.1.tokens", str(STEPS[1] * 512)]
    started = []
    for index in range(processes):
        which = ["--coordinator", address, "--processes", str(processes), "--process", str(index)]
        own = [*start, *(which if processes > 1 else [])]
        started.append(
            subprocess.Popen(
                own,
                cwd=place,
                env=environment(place, devices),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = [(each, *each.communicate(timeout=600)) for each in started]
    for each, _, errors in ended:
        assert each.returncode == 0, errors[-4000:]
    return [subprocess.CompletedProcess(each.args, 0, out, errors) for each, out, errors in ended]


def figures(place, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(losses of all steps, bits per byte of all evaluations)."""
    stages = place / name / "stages"
    text = "".join((stages / stage / "metrics.jsonl").read_text() for stage in ("1-rows", "2-lora"))
    lines = [json.loads(line) for line in text.splitlines()]
    entries = json.loads((place / name / "eval.json").read_text())
    return np.array([line["loss"] for line in lines]), np.array([entry["bits_per_byte"] for entry in entries])


@pytest.fixture(scope="module")
def alone(place):
    run(place, "alone", 1, 1, "fsdp=1", "train")
    return figures(place, "alone")


@pytest.mark.slow
def test_four_processes_are_as_one(place, monkeypatch, capsys):
    """Of two devices each: the halves of rows, and copies, are on several, each matrix is cut within one."""
    run(place, "alone", 1, 1, "fsdp=1", "train")
    done = run(place, "by-4", 4, 2, "replica=2,context=2,tensor=2", "train")
    (losses, evaluations), (expected, evaluated) = figures(place, "by-4"), figures(place, "alone")
    assert len(losses) == sum(STEPS)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(evaluations, evaluated, rtol=1e-5)
    # One of them speaks.
    assert "bits per byte" in done[0].stdout
    assert all("bits per byte" not in each.stdout for each in done[1:])
    assert all("steps" not in each.stderr for each in done[1:])
    assert all("donated" not in each.stderr for each in done)
    # Another command, by one process, goes on with what they left.
    assert not (place / "by-4" / "export").exists()
    go(monkeypatch, place)
    longer = ["--stages.1.tokens", STEPS[1] * 512]
    status, _, errors = call(capsys, "run", "recipes:tiny", "--workdir", "by-4", "--mesh", "fsdp=8", *longer)
    assert status == 0, errors
    assert "steps" not in errors
    assert (place / "by-4" / "export" / "model.safetensors").exists()
    assert (place / "by-4" / "report.html").exists()


@pytest.mark.slow
def test_a_watch_decides_the_same_in_several_processes(place):
    alone, together = (place / f"watched-by-{processes}" for processes in (1, 2))
    for directory, processes, mesh in ((alone, 1, "fsdp=1"), (together, 2, "fsdp=2")):
        run(place, directory.name, processes, 1, mesh, "train", "watching:watched")
    for name in ("1-stopped", "2-raised"):
        (losses, looks, ended), (expected, seen, end) = (
            watched_stage(directory / "stages" / name) for directory in (together, alone)
        )
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
        assert ended == end
        for look, other in zip(looks, seen, strict=True):
            assert (look["step"], done(look)) == (other["step"], done(other))
            assert look["bits_per_byte"] == pytest.approx(other["bits_per_byte"], rel=1e-4)
        if name == "1-stopped":
            assert done(looks[-1]) == "stop"
            assert ended == len(losses) == looks[-1]["step"] < 12
        else:
            # The rows that are packed next, those of the steps from 9 on, are of the raised shares.
            assert [done(look) for look in looks[:2]] == ["", "raise replay from 2.0% to 40.0%"]
            assert len(losses) == 12
    entries = [json.loads((directory / "eval.json").read_text()) for directory in (together, alone)]
    np.testing.assert_allclose(*([entry["bits_per_byte"] for entry in each] for each in entries), rtol=1e-4)


def done(look: dict) -> str:
    """What a watch did, without the reason."""
    return (look["action"] or "").partition(":")[0]


def watched_stage(directory) -> tuple[list[float], list[dict], int | None]:
    """(losses of its steps, what its watch saw and did, the step that it ended after, if it ended early)."""
    losses, looks = (
        [json.loads(line) for line in (directory / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "watch.jsonl")
    )
    return [line["loss"] for line in losses], looks, (ended_early(directory) or (None, ""))[0]
