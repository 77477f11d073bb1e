"""`cpt run` asked to end and started again, `cpt doctor` on a run that is whole, and on one that is not."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from commands import call, environment, go
from inputs import english, write_jsonl

pytestmark = pytest.mark.slow
RECIPE = """
from cpt_jax.adapt import Full
from cpt_jax.data.holdout import Holdout
from cpt_jax.data.sources import Corpus
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.recipe.recipe import *

def short(tokens=40 * 256) -> Recipe:
    held = Holdout(share=0.2, max_bytes=1000)
    return Recipe(
        name="short", base={base!r},
        domains=(Domain(corpus=Corpus(name="en", spec="en.jsonl"), role="new", heldout=held),),
        stages=(
            Stage(name="all", method=Full(), mixture={{"en": 1.0}}, tokens=tokens, batch_size=4, sequence_length=64,
                  optimizer=AdamW(learning_rate=1e-3), checkpoint_seconds=0.05, keep=Keep(last=3)),
        ),
        evaluation=Evaluation(sequence_length=128),
    )

def long() -> Recipe:
    return short(20_000 * 256)
"""


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    write_jsonl(root / "en.jsonl", english(300))
    (root / "recipes.py").write_text(RECIPE.format(base=str(tiny_model)))
    return root


def start(*arguments, cwd) -> subprocess.Popen:
    command = [sys.executable, "-m", "cpt_jax", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=environment(cwd), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def cpt(*arguments, cwd) -> tuple[int, str, str]:
    process = start(*arguments, cwd=cwd)
    out, error = process.communicate()
    return process.returncode, out, error


@pytest.fixture
def here(place, monkeypatch, capsys):
    """A command in this process."""
    go(monkeypatch, place)
    return functools.partial(call, capsys)


@pytest.fixture
def doctor(here):
    return functools.partial(here, "doctor")


def test_sigterm_ends_with_the_code_that_launchers_try_again_on(place, here, doctor):
    process = start("run", "recipes:long", "--workdir", "asked", cwd=place)
    metrics = place / "asked" / "stages" / "1-all" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    code, _, error = here("run", "recipes:long", "--workdir", "asked")
    assert code == 2
    assert "another process is running in asked" in error
    code, _, error = doctor("asked")
    assert code == 2
    assert "a process is running in asked" in error
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 75, error
    assert "preempted: stage-all: step" in error
    code, out, _ = doctor("asked")
    assert code == 0, out
    assert "not finished: stage-all" in out


@pytest.fixture(scope="module")
def finished(place):
    code, _, error = cpt("run", "recipes:short", "--workdir", "run", cwd=place)
    assert code == 0, error
    return place / "run"


def change(path):
    content = bytearray(path.read_bytes())
    content[len(content) - len(content) // 3] ^= 0x40
    path.write_bytes(content)


def largest(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_doctor_finds_nothing_in_a_whole_run_and_every_part_that_was_changed(finished, place, doctor):
    code, out, _ = doctor("run", "--json", "found.json")
    assert code == 0, out
    assert json.loads((place / "found.json").read_text())["good"]
    assert "Goodput" in (finished / "report.html").read_text()
    harmed = shutil.copytree(finished, place / "harmed")
    change(largest(harmed / "stages" / "1-all" / "checkpoints" / "40"))
    change(harmed / "data" / "en" / "train-00000.arrayrecord")
    change(harmed / "export" / "model.safetensors")
    code, out, _ = doctor("harmed")
    assert code == 1
    wrong = [line for line in out.splitlines() if line.startswith("WRONG")]
    assert [line.split()[1] for line in wrong] == ["data/en:", "stages/1-all:", "export:"]
    assert "checkpoint 40 is damaged" in out
    assert "train-00000.arrayrecord is not what was written" in out


def test_a_last_checkpoint_that_was_removed_is_made_again_from_the_one_before(finished, place, doctor):
    again = shutil.copytree(finished, place / "again")
    shutil.rmtree(again / "stages" / "1-all" / "checkpoints" / "40")
    code, _, error = cpt("run", "recipes:short", "--workdir", "again", cwd=place)
    assert code == 0, error
    assert "stage-all: continues after step" in error
    for name in ("eval.json", "export/model.safetensors"):
        assert (again / name).read_bytes() == (finished / name).read_bytes(), name
    code, out, _ = doctor("again")
    assert code == 0, out
