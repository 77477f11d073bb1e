"""Checkpoints of two processes that have no disk in common."""

import json
import math
import socket
import subprocess
import sys

from commands import environment
from fsspec.config import conf

from cpt_jax.checkpoint.keep import METRIC, Keep
from cpt_jax.checkpoint.stored import StoredCheckpoints
from cpt_jax.core.stores import Store

PROCESS = """
import asyncio, json, sys
from pathlib import Path
from cpt_jax.core.processes import Processes
number, port, root = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
Processes(coordinator=f"127.0.0.1:{port}", count=2, index=number).start()
import fsspec, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from cpt_jax.checkpoint.intact import Checksummed
from cpt_jax.checkpoint.keep import Keep
from cpt_jax.checkpoint.stored import StoredCheckpoints, is_chunk, is_trained
from cpt_jax.checkpoint.train_state import Checkpoints, read_trained
from cpt_jax.core.stores import Store
from cpt_jax.training.state import TrainState

fsspec.config.conf["file"] = {"auto_mkdir": True}
if number == 1:
    create = Checksummed.create

    async def late(self):
        await asyncio.sleep(1.0)
        return await create(self)

    Checksummed.create = late

mesh = Mesh(np.array(jax.devices()), ("fsdp",))
whole = np.random.default_rng(0).normal(size=(600, 70)).astype(np.float32)

def spread(array, *axes):
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, PartitionSpec(*axes)), lambda at: array[at])

def state(step, rows=("fsdp",), columns=(None, "fsdp")):
    trainable, mean = {"kernel": spread(whole + step, *rows)}, {"mean": spread(whole * step, *columns)}
    return TrainState(spread(np.asarray(step)), trainable, mean, None)

def opened(place):
    stage = root / f"{place}-{number}"
    stage.mkdir(exist_ok=True)
    (stage / "metrics.jsonl").touch()
    return stage, StoredCheckpoints(Store(f"file://{root}/store"), stage, Keep())

stage, stored = opened("first")
checkpoints = Checkpoints(stage / "checkpoints", Keep(), stored)
for step in (1, 2):
    checkpoints.save(state(step), {"position": step}, 1.0)
checkpoints.wait()
checkpoints.close()

def chunk_bytes(checkpoint):
    files = [path for path in checkpoint.rglob("*") if is_chunk(str(path.relative_to(checkpoint)))]
    return sum(path.stat().st_size for path in files)

def restored(place, *axes):
    stage, stored = opened(place)
    checkpoints = Checkpoints(stage / "checkpoints", Keep(), stored)
    found, loader = checkpoints.restore(state(0, *axes))
    checkpoints.close()
    assert loader == {"position": 2}
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(state(2, *axes)), strict=True):
        for ours, theirs in zip(leaf.addressable_shards, expected.addressable_shards, strict=True):
            np.testing.assert_array_equal(ours.data, theirs.data)
    return stage, stored, chunk_bytes(stage / "checkpoints" / "2")

parts = [restored("as it was")[2], restored("otherwise", (None, "fsdp"), ("fsdp",))[2]]
print(json.dumps({"whole": chunk_bytes(root / "store" / "checkpoints" / "2"), "parts": parts}))
stage, stored, _ = restored("again")
stored.fetch(is_trained)
np.testing.assert_array_equal(read_trained(stage / "checkpoints")["last"]["kernel"], whole + 2)
"""


def test_what_stays_is_looked_at_once_however_many_stay(tmp_path, monkeypatch):
    monkeypatch.setitem(conf, "file", {"auto_mkdir": True})
    store, read = Store(f"file://{tmp_path}/store"), Store.read
    looked_at: list[str] = []
    monkeypatch.setattr(Store, "read", lambda store, name: looked_at.append(name) or read(store, name))
    stored = StoredCheckpoints(store, tmp_path, Keep(last=3, best=1))
    (tmp_path / "metrics.jsonl").touch()
    for step, loss in enumerate((5.0, 1.0, 4.0, 3.0, 2.0, 6.0), start=1):
        metrics = tmp_path / "checkpoints" / str(step) / "metrics" / "metrics"
        metrics.parent.mkdir(parents=True)
        metrics.write_text(json.dumps({METRIC: loss}))
        stored.put(step)
        stored.wait()
    assert stored.steps() == [6, 5, 4, 2]
    assert {name.partition("/")[0].partition(".")[0] for name in store.below("checkpoints").names()} == set("2456")
    assert sorted(looked_at) == [f"{step}.json" for step in range(1, 7)]


def test_a_loss_that_is_no_number_is_listed_and_never_the_best(tmp_path, monkeypatch):
    monkeypatch.setitem(conf, "file", {"auto_mkdir": True})
    store = Store(f"file://{tmp_path}/store")
    (tmp_path / "metrics.jsonl").touch()
    for step, loss in enumerate((math.nan, 5.0, math.nan), start=1):
        metrics = tmp_path / "checkpoints" / str(step) / "metrics" / "metrics"
        metrics.parent.mkdir(parents=True)
        metrics.write_text(json.dumps({METRIC: loss}))
        # As by a process each, which reads what the one before has listed.
        stored = StoredCheckpoints(store, tmp_path, Keep(last=1, best=1))
        stored.put(step)
        stored.wait()
    assert stored.steps() == [3, 2]
    assert json.loads(store.read("checkpoints/3.json") or "")["loss"] is None


def test_each_writes_and_fetches_its_part_whole_though_one_is_slow(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(number), str(port), str(tmp_path)],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        for process in processes:
            out, problems = process.communicate(timeout=60)
            assert process.returncode == 0, problems[-3000:]
            read = json.loads(out.splitlines()[-1])
            # Half of each array that lies as it was saved; of all chunks a part, where it is cut the other way.
            assert 0.4 * read["whole"] < read["parts"][0] < 0.6 * read["whole"]
            assert read["parts"][1] == read["whole"]
    finally:
        for process in processes:
            process.kill()
