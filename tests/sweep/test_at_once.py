"""Processes of a sweep beside one another: which GPU each is given, and what is left when one is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpt_jax.core.errors import UserError
from cpt_jax.data.sources import Corpus
from cpt_jax.recipe.recipe import Domain, Recipe
from cpt_jax.sweep import at_once
from cpt_jax.sweep.directory import SweepDirectory
from cpt_jax.sweep.sweep import Manner

UUIDS = ("GPU-8a4f0c11-1f6e-2c0d-93a7-55c1d1f0e001", "GPU-8b7710aa-0d3b-41f2-8c55-0e6a3a7be002")
GIGABYTES = 80_000 << 20


def recipes(*names: str) -> dict[str, Recipe]:
    domain = Domain(corpus=Corpus(name="zh", spec="zh.jsonl"), role="new")
    return {name: Recipe(name=name, base="b", domains=(domain,), stages=()) for name in names}


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """As nvidia-smi lists them: index, UUID, free memory, of which it is asked for some."""
    (tmp_path / "bin").mkdir()
    lines = [
        "case $* in *index,uuid,memory.free*) ;; *) exit 1 ;; esac",
        *(f"echo '{index}, {uuid}, 80000'" for index, uuid in enumerate(UUIDS)),
    ]
    (tmp_path / "bin" / "nvidia-smi").write_text("\n".join(["#!/bin/bash", *lines, ""]))
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("JAX_PLATFORMS")
    return tmp_path


@pytest.mark.parametrize(
    ("visible", "given"),
    [
        (None, ["0", "1"]),
        ("1", ["1"]),
        ("1, 0", ["1", "0"]),
        (",".join(UUIDS[::-1]), list(UUIDS[::-1])),
        ("GPU-8b", ["GPU-8b"]),
        ("", []),
        ("-1", []),
    ],
)
def test_each_process_has_a_gpu_as_cuda_names_it(two_gpus, monkeypatch, visible, given):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = at_once.visible_gpus()
    assert gpus == [at_once.GPU(name, GIGABYTES) for name in given]
    for slot in range(4 if gpus else 0):
        environment = at_once._environment(slot, 4, gpus)
        assert environment["CUDA_VISIBLE_DEVICES"] == given[slot % len(given)]
        assert float(environment["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == pytest.approx(0.9 * len(given) / 4)


def test_parts_of_a_gpu_are_given_out_and_a_number_is_asked_for(two_gpus, monkeypatch):
    parts = [f"MIG-{number}3b0e1c7-9d2c-5e0f-b1b4-2f1f6c0a0003" for number in (4, 5)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(parts))
    gpus = at_once.visible_gpus()
    assert [at_once._environment(slot, 2, gpus)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == parts
    untold = rf"free memory of {parts[0]}, {parts[1]}: give a number, as in --at-once 2"
    with SweepDirectory(two_gpus / "sweep", "e", recipes("a")) as directory, pytest.raises(UserError, match=untold):
        at_once.by_memory(directory, directory.recipes, gpus)


def test_a_process_that_is_killed_takes_no_other_along(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\ncase $* in */a.json*) kill -9 $$ ;; esac\nsleep 0.5; echo error: of its own; exit 2\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(at_once.sys, "executable", str(python))
    with SweepDirectory(tmp_path / "sweep", "e", recipes("a", "b")) as directory:
        at_once.run_at_once(directory, directory.recipes, Manner(at_once=2))
        assert "its process ended with -9" in directory.failed()["a"]
        assert directory.failed()["b"] == "of its own"


SWEEP = """
import sys
from pathlib import Path
from test_at_once import Manner, SweepDirectory, at_once, recipes

here = Path.cwd()
at_once.sys.executable = str(here / "python")
with SweepDirectory(here / "sweep", "e", recipes("a", "b")) as directory:
    at_once.run_at_once(directory, directory.recipes, Manner(at_once=2))
"""


def test_what_a_killed_sweep_has_begun_is_waited_for(tmp_path):
    """Its runs go on; another sweep would find their directories in use, and say that they have failed."""
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\necho $$ > $6.pid\nwhile [ ! -e end ]; do sleep 0.05; done\n")
    python.chmod(0o755)
    (tmp_path / "sweep" / "runs").mkdir(parents=True)
    (tmp_path / "sweep" / "sweep.json").write_text('{"experiment": "e", "runs": []}')
    paths = [Path(__file__).parent, *(Path(__file__).parents[number] for number in (1, 2))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    sweep = subprocess.Popen([sys.executable, "-c", SWEEP], cwd=tmp_path, env=environment)
    begun = [tmp_path / "sweep" / "runs" / f"{name}.pid" for name in ("a", "b")]
    try:
        while not all(path.exists() and path.read_text() for path in begun):
            assert sweep.poll() is None
            time.sleep(0.05)
        sweep.send_signal(signal.SIGKILL)
        sweep.wait()
        for path in begun:
            os.kill(int(path.read_text()), 0)
        with pytest.raises(UserError, match=r"a run that one has begun, is at work in .*: wait for it"):
            SweepDirectory(tmp_path / "sweep", "e", recipes("a", "b"))
    finally:
        (tmp_path / "end").touch()
    until = time.monotonic() + 30
    while True:
        try:
            with SweepDirectory(tmp_path / "sweep", "e", recipes("a", "b")):
                break
        except UserError:
            assert time.monotonic() < until
            time.sleep(0.05)
