"""A run by several processes is the run of one: the same losses on the same documents, by the same command."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
from commands import environment
from tiny_recipe import write_tiny

# Of the two stages; several processes ask each other every eighth.
STEPS = (5, 9)


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    write_tiny(root, tiny_model)
    return root


def run(
    place, name: str, processes: int, devices: int, mesh: str, command: str = "run"
) -> list[subprocess.CompletedProcess]:
    """By so many processes of so many devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    start = [sys.executable, "-m", "cpt_jax", command, "recipes:tiny", "--workdir", name, "--mesh", mesh]
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
    done = [(each, *each.communicate(timeout=600)) for each in started]
    for each, _, errors in done:
        assert each.returncode == 0, errors[-4000:]
    return [subprocess.CompletedProcess(each.args, 0, out, errors) for each, out, errors in done]


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
@pytest.mark.parametrize(
    ("processes", "devices", "mesh", "command"),
    [(2, 4, "fsdp=4,tensor=2", "run"), (4, 2, "replica=2,fsdp=2,context=2", "train")],
    ids=["2 processes of 4 devices", "4 processes of 2 devices"],
)
def test_several_processes_are_as_one(place, alone, processes, devices, mesh, command):
    name = f"by-{processes}"
    done = run(place, name, processes, devices, mesh, command)
    losses, evaluations = figures(place, name)
    assert len(losses) == sum(STEPS)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    np.testing.assert_allclose(evaluations, alone[1], rtol=1e-5)
    # One of them speaks.
    assert "bits per byte" in done[0].stdout
    assert all("bits per byte" not in each.stdout for each in done[1:])
    assert all("steps" not in each.stderr for each in done[1:])
    if command == "train":
        # Another command, by one process, goes on with what they left.
        assert not (place / name / "export").exists()
        [again] = run(place, name, 1, 1, "fsdp=1")
        assert "steps" not in again.stderr
    assert (place / name / "export" / "model.safetensors").exists()
    assert (place / name / "report.html").exists()
