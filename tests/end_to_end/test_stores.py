"""A run whose directory, corpus and base are in an object store is the run on a disk: killed and continued on another
machine, by one process or by two that have no file system in common."""

import functools
import gzip
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import call, environment, go
from store_server import s3_server
from tiny_recipe import write_tiny

from cpt_jax.core.stores import Store

pytestmark = pytest.mark.slow
RUNS = "s3://bucket/runs"
# Of the second stage.
STEPS = 9
SHORT = ["--stages.1.tokens", str(STEPS * 512)]


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    with s3_server():
        write_tiny(root, tiny_model, base="s3://bucket/base", zh="s3://bucket/corpora/zh-*.jsonl.gz")
        Store("s3://bucket/base").upload(tiny_model, (path for path in tiny_model.iterdir() if path.is_file()))
        Store("s3://bucket").write("corpora/zh-0.jsonl.gz", gzip.compress((root / "zh.jsonl").read_bytes(), mtime=0))
        yield root


def begin(place: Path, cache: str, *arguments: str) -> subprocess.Popen:
    """A command of cpt on a machine of its own, as far as it can tell."""
    own = {"XDG_CACHE_HOME": str(place / cache)}
    command = [sys.executable, "-m", "cpt_jax", *arguments]
    return subprocess.Popen(
        command, cwd=place, env=environment(place, 2) | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen, expected: int = 0) -> tuple[str, str]:
    out, errors = process.communicate(timeout=600)
    assert process.returncode == expected, errors[-4000:]
    return out, errors


def run(place: Path, cache: str, name: str, *more: str) -> subprocess.Popen:
    return begin(place, cache, "run", "recipes:tiny", "--workdir", f"{RUNS}/{name}", "--mesh", "fsdp=2", *SHORT, *more)


@pytest.fixture
def cpt(place, monkeypatch, capsys):
    """A command in this process, as on a machine that has nothing of the runs."""
    go(monkeypatch, place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "elsewhere"))
    return functools.partial(call, capsys)


def content(store: Store) -> dict[str, bytes | None]:
    return {name: store.read(name) for name in store.names()}


def losses(read) -> np.ndarray:
    """`read`: the content of a file of a run."""
    text = b"".join(read(f"stages/{stage}/metrics.jsonl") for stage in ("1-rows", "2-lora")).decode()
    return np.array([json.loads(line)["loss"] for line in text.splitlines()])


@pytest.fixture(scope="module")
def on_disk(place):
    """A run in a directory, never interrupted."""
    end(begin(place, "disk", "run", "recipes:tiny", "--workdir", "run", "--mesh", "fsdp=2", *SHORT))
    return lambda name: (place / "run" / name).read_bytes()


def test_a_killed_run_is_continued_on_another_machine(place, on_disk, cpt):
    store = Store(f"{RUNS}/killed")
    often = ["--stages.1.checkpoint_seconds", "0"]
    first = run(place, "one", "killed", *often)
    # Its own copy is asked first: each look into the store is work for the server.
    while not any((place / "one").rglob("2-lora/metrics.jsonl")):
        assert first.poll() is None, first.communicate()[1][-4000:]
        time.sleep(0.2)
    while not any(name.startswith("stages/2-lora/checkpoints/3.json") for name in store.names()):
        assert first.poll() is None, first.communicate()[1][-4000:]
        time.sleep(0.05)
    for command in (["doctor", store.address], ["export", "--run", store.address, "--out", "out"]):
        status, _, errors = cpt(*command)
        assert status == 2
        assert "is running in s3://bucket/runs/killed" in errors
    first.kill()
    first.communicate()
    # How often it is saved does not change what is computed, but what the recipe says.
    out, errors = end(run(place, "two", "killed", "--update", often[0], "60"))
    assert "report: s3://bucket/runs/killed/report.html" in out
    assert "stage-lora: continues after step" in errors
    assert "stage-rows" not in errors
    np.testing.assert_array_equal(losses(store.read), losses(on_disk))
    for name in ("eval.json", "export/model.safetensors", "tokenizer/tokenizer.json", "samples.md"):
        assert store.read(name) == on_disk(name), name
    # As many checkpoints as the stage keeps, and no lease.
    left = {name.split("/")[3] for name in store.names("stages/2-lora/checkpoints")}
    assert {str(STEPS), f"{STEPS}.json"} < left
    assert len(left) == 4
    assert store.read(".lease.json") is None


def test_a_run_is_examined_and_reported_where_it_lies(place, cpt):
    """The run of the test before."""
    store = Store(f"{RUNS}/killed")
    before = content(store)
    store.remove("report.html")
    assert cpt("report", store.address)[:2] == (0, f"{store.address}/report.html\n")
    assert content(store).keys() == before.keys()
    status, out, _ = cpt("doctor", store.address, "--json", "s3://bucket/found.json")
    assert status == 0, out
    assert f"stages/2-lora: 2 checkpoints; that of step {STEPS} opens" in out
    assert json.loads(Store("s3://bucket").read("found.json") or b"")["good"]
    # Nothing but the report was written.
    after = content(store)
    assert {name for name in before if before[name] != after[name]} <= {"report.html", *store.names("plots")}
    chunk = max((name for name in before if "/checkpoints/9/state/" in name), key=lambda name: len(before[name] or b""))
    for name in (chunk, "tokenizer/tokenizer.json"):
        harmed = bytearray(before[name] or b"")
        harmed[len(harmed) // 2] ^= 0x40
        store.write(name, bytes(harmed))
    status, out, _ = cpt("doctor", store.address)
    assert status == 1
    wrong = [line for line in out.splitlines() if line.startswith("WRONG")]
    assert [line.split()[1] for line in wrong] == ["run:", "stages/2-lora:", "export:"]
    assert "tokenizer/tokenizer.json is not what was written (SHA-256): run the recipe again" in wrong[0]
    assert f"checkpoint {STEPS} is damaged ({chunk.partition(f'/{STEPS}/')[2]} is not what was written" in wrong[1]
    assert str(place) not in out


def test_two_processes_need_no_file_system_in_common(place, on_disk, cpt):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    which = ["--coordinator", address, "--processes", "2", "--process"]
    mesh = ["--mesh", "fsdp=4"]
    both = [run(place, f"machine-{index}", "two", *which, str(index), *mesh) for index in range(2)]
    for process in both:
        end(process)
    store = Store(f"{RUNS}/two")
    np.testing.assert_allclose(losses(store.read), losses(on_disk), rtol=1e-5)
    # What they left is whole: another machine has nothing to do, and exports what they trained.
    status, _, errors = cpt("run", "recipes:tiny", "--workdir", store.address, "--mesh", "fsdp=8", *SHORT)
    assert status == 0, errors
    assert "steps" not in errors
    assert cpt("export", "--run", f"{RUNS}/two", "--weights", "last", "--out", "s3://bucket/out")[0] == 0
    assert Store("s3://bucket/out").read("model.safetensors")
    assert cpt("eval", "--model", f"{RUNS}/two", "--data", "zh=s3://bucket/corpora/zh-0.jsonl.gz")[0] == 0
