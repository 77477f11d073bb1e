"""Checkpoints in an object store, where processes have no file system in common.

Each process writes its own part of a checkpoint to its own disk (orbax, an array a directory of chunks, each chunk by
one process), and uploads it in the background. When all have done that, the first one writes STEP.json, which lists all
files: a checkpoint without it is not there. To continue, each process fetches the chunks that its devices hold.
"""

import itertools
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import multihost

from cpt_jax.checkpoint.intact import CHECKSUMS, LATER
from cpt_jax.checkpoint.keep import METRIC, Keep
from cpt_jax.core.errors import UserError
from cpt_jax.core.processes import WAIT_SECONDS
from cpt_jax.core.storage import json_line, numbers
from cpt_jax.core.stores import Store

# Of the files below state/, those that differ between processes.
_CHUNK = re.compile(r"state/.*/[0-9.]+")
_LISTED = re.compile(r"([0-9]+)\.json")


class StoredCheckpoints:
    """Those of one stage.

    Args:
      store: of the stage; checkpoints are below checkpoints/.
      directory: the stage's on this process's disk.
      log: called before a checkpoint is listed, to put there what else is to be as new as it is.
    """

    def __init__(self, store: Store, directory: Path, keep: Keep, log: Callable[[], None] = lambda: None) -> None:
        self._store, self._directory, self._keep, self._log = (
            store.below("checkpoints"),
            directory / "checkpoints",
            keep,
            log,
        )
        self._stage, self._metrics = store, directory / "metrics.jsonl"
        # Of checkpoints that are listed, which do not change any more: not read again at each save.
        self._losses: dict[int, float] = {}
        self._uploading: threading.Thread | None = None
        self._error: Exception | None = None

    def steps(self) -> Sequence[int]:
        """Of the checkpoints that are there, the newest first."""
        return _listed(self._store.names())

    def _listing(self, step: int) -> dict:
        return json.loads(self._store.read(f"{step}.json") or b"{}")

    def fetch(self, wanted: Callable[[str], bool]) -> None:
        """Makes the newest checkpoint the only one on this process's disk, with those of its files whose names are
        wanted, and its metrics lie beside it.

        Raises:
          UserError: it is damaged.
        """
        newest = next(iter(self.steps()), None)
        for path in self._directory.glob("*"):
            if path.name != str(newest):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if newest is None:
            return
        files = self._listing(newest)["files"]
        listed = {name: digest for name, digest in files.items() if wanted(name)}
        if wrong := self._store.fetch(self._directory / str(newest), listed, str(newest)):
            raise UserError(
                f"{self._store.address}/{newest} is damaged ({wrong[0]}): remove {newest}.json beside it, and run the recipe again: it goes on from the one before"
            )
        _write_checksums(self._directory / str(newest), listed)
        if (metrics := self._stage.read("metrics.jsonl")) is not None:
            self._metrics.write_bytes(metrics)

    def fetch_shards(self, like: Any) -> None:
        """Has the chunks too that the devices of this process are to hold of arrays that are placed as `like` is."""
        newest = self._directory / str(next(iter(self.steps())))
        needed = _chunks(like, newest)
        self.fetch(lambda name: name in needed or not is_chunk(name))

    def put(self, step: int) -> None:
        """Begins to upload a checkpoint that is complete on this process's disk."""
        self.wait()
        self._uploading = threading.Thread(target=self._put, args=(step,), name=f"upload of step {step}", daemon=True)
        self._uploading.start()

    def check(self) -> None:
        """Raises what went wrong in the background."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Returns when what was begun is in the store."""
        if self._uploading is not None:
            self._uploading.join()
            self._uploading = None
        self.check()

    def _put(self, step: int) -> None:
        try:
            self._upload(step)
        except Exception as error:
            self._error = error

    def _upload(self, step: int) -> None:
        local, own = self._directory / str(step), jax.process_index()
        files = [path for path in local.rglob("*") if path.is_file() and path != local / CHECKSUMS]
        if own:
            files = [path for path in files if is_chunk(str(path.relative_to(local)))]
        listed = self._store.upload(local, files, str(step))
        if own:
            self._store.write(f"{step}.of-{own}", json.dumps(listed).encode())
        _all_here(f"{self._store.address}/{step} is uploaded")
        if own == 0:
            for other in range(1, jax.process_count()):
                listed |= json.loads(self._store.read(f"{step}.of-{other}") or b"{}")
                self._store.remove(f"{step}.of-{other}")
            self._stage.write("metrics.jsonl", self._metrics.read_bytes())
            self._log()
            loss = json.loads((local / "metrics" / "metrics").read_text())[METRIC]
            self._store.write(f"{step}.json", json_line({"loss": loss, "files": listed}).encode())
            self._prune()
        _all_here(f"{self._store.address}/{step} is listed")

    def _prune(self) -> None:
        """Removes what does not stay, and what a process that was killed left of an upload."""
        names = self._store.names()
        self._losses = {
            step: self._losses[step] if step in self._losses else numbers(self._listing(step))["loss"]
            for step in _listed(names)
        }
        kept = self._keep.kept(self._losses)
        gone = {part for part in (name.partition("/")[0] for name in names) if int(part.partition(".")[0]) not in kept}
        # The list goes before what it lists.
        for part in sorted(gone, key=lambda part: not part.endswith(".json")):
            self._store.remove(part)


def _listed(names: Iterable[str]) -> list[int]:
    """Steps that are listed among these names, the newest first."""
    return sorted((int(match[1]) for name in names if (match := _LISTED.fullmatch(name))), reverse=True)


def is_chunk(name: str) -> bool:
    """Whether a file of a checkpoint holds a part of an array."""
    return _CHUNK.fullmatch(name) is not None


def is_trained(name: str) -> bool:
    """Whether it is needed of a stage that is done: what its optimizer remembers is not."""
    return not (is_chunk(name) and name.startswith("state/optimizer_state."))


def _chunks(like: Any, checkpoint: Path) -> set[str]:
    """The names of the chunks with what this process's devices hold of arrays that are placed as `like` is."""
    needed = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        name = "state/" + ".".join(str(jax.tree_util.keystr((key,), simple=True)) for key in path)
        chunk = json.loads((checkpoint / name / ".zarray").read_text())["chunks"]
        for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
            spans = [part.indices(size) for part, size in zip(index, leaf.shape, strict=True)]
            places = [
                range(start // size, -(-stop // size)) for (start, stop, _), size in zip(spans, chunk, strict=True)
            ]
            needed |= {f"{name}/{'.'.join(map(str, at)) or '0'}" for at in itertools.product(*places)}
    return needed


def _write_checksums(checkpoint: Path, listed: Mapping[str, str]) -> None:
    """As a checkpoint on a disk has them."""
    own = {name: digest for name, digest in listed.items() if Path(name).name not in LATER}
    (checkpoint / CHECKSUMS).write_text(json.dumps(own, indent=1))


def as_on_disk(directory: Path) -> None:
    """Makes a copy of a store's checkpoints/ what it would be on a disk: what is listed, with its checksums."""
    listings = {match[1]: path for path in directory.glob("*") if (match := _LISTED.fullmatch(path.name))}
    for path in directory.glob("*"):
        if path.is_dir() and path.name not in listings:
            shutil.rmtree(path)
    for step, path in listings.items():
        (directory / step).mkdir(exist_ok=True)
        _write_checksums(directory / step, json.loads(path.read_text())["files"])
        path.unlink()


def _all_here(name: str) -> None:
    """Returns when all processes have come here; not in the main thread, which has barriers of its own."""
    if jax.process_count() > 1:
        multihost.get_barrier_sync_fn()(key=name, timeout_ms=WAIT_SECONDS * 1000)


def own_parts(options: ocp.CheckpointManagerOptions) -> dict[str, ocp.CheckpointHandler]:
    """Makes orbax write each process's part to its own disk; returns the handlers of what is saved."""
    options.multiprocessing_options = alone = ocp.options.MultiprocessingOptions(primary_host=None)
    # In the background, all processes are told that the directory is there by the first that has made its own: another
    # would write where nothing is yet, and then make, or empty, its own.
    options.async_options = ocp.AsyncOptions(create_directories_asynchronously=False)
    arrays = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(primary_host=None, replica_id=0, use_replica_parallel=False))
    )
    state = ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=alone, type_handler_registry=arrays)
    return {"state": state, "loader": ocp.JsonCheckpointHandler(multiprocessing_options=alone)}
