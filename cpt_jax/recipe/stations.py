"""A run's directory: whose it is, and which of its stations are done.

A station is a part of the run with inputs and outputs (the tokenizer, a domain's data, a stage of training). It is
skipped when it was finished with the same inputs, continued when it was begun with the same inputs, and made anew
otherwise.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from cpt_jax.checkpoint.keep import Keep
from cpt_jax.checkpoint.stored import is_trained
from cpt_jax.core import processes
from cpt_jax.core.config import KIND, differences, fingerprint
from cpt_jax.core.errors import UserError
from cpt_jax.core.journal import JOURNAL, Journal, process_started
from cpt_jax.core.progress import say
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.core.stores import Location, is_address
from cpt_jax.recipe.copies import is_of_model
from cpt_jax.recipe.mirror import MARKS, Mirror
from cpt_jax.recipe.recipe import Recipe, saved_form
from cpt_jax.recipe.shared import SharedStations

# Part of every fingerprint: raise it when the meaning of a station's outputs changes.
FORMAT = 5
# What a look at the new text found, for the defaults of `cpt adapt`.
SAMPLE = "sample.json"


def identity(path: Path) -> list:
    """What tells whether a file, or a model's directory, is still what was read: names, sizes, times. What else lies in
    the directory (a model card, the hub's bookkeeping) is not the model. Of what is not there, the name."""
    if not path.exists():
        return [str(path)]
    files = sorted(filter(is_of_model, path.iterdir())) if path.is_dir() else [path]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def holds_nothing_else(path: Path) -> bool:
    """Whether nothing is in a work directory but what is written there before its run begins."""
    return not path.exists() or (path.is_dir() and set(os.listdir(path)) <= {".lock", "source", SAMPLE})


def _given(inputs: object) -> dict[str, Any]:
    """What a station's fingerprint is of."""
    return {"inputs": inputs, "format": FORMAT}


class Begun(NamedTuple):
    """A station that is done, or is worked on since `started`; in earlier tries it took `seconds_before`."""

    name: str
    fingerprint: str
    # Without what may change while it is under way.
    fixed: str
    outputs: Sequence[Path]
    done: bool
    seconds_before: float
    started: float


class Workdir:
    """One run's directory, locked by this process.

    Args:
      shared: where the runs of a sweep find what they have in common.

    Raises:
      UserError: another process runs in it, it holds something that is no run, or it belongs to another recipe
        (and `update` is not set); nothing in it is changed then.
    """

    def __init__(
        self, location: Location, recipe: Recipe, *, update: bool = False, shared: SharedStations | None = None
    ) -> None:
        self.location, self.shared = location, shared
        self.mirror = Mirror(str(location)) if is_address(location) else None
        self.path = path = Path(location) if self.mirror is None else self.mirror.path
        self.seconds: dict[str, float] = {}
        self._found_done: set[str] = set()
        self._lock: IO[str] | None = None
        # Others would look at it while the first one begins it.
        if (refusal := processes.told(self._claimed(recipe, update) if processes.is_first() else None)) is not None:
            raise UserError(refusal)
        path.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(path / JOURNAL if processes.is_first() else None)
        # A start that does nothing is not told.
        self._started: float | None = round(process_started(), 3)

    def _claimed(self, recipe: Recipe, update: bool) -> str | None:
        """Makes it this run's, in the store too; or says why not."""
        if self.mirror is None:
            return self._claim(recipe, update)
        try:
            if (refusal := self.mirror.lease.take()) is not None:
                return refusal
            if (refusal := self.mirror.begin() or self._claim(recipe, update)) is None:
                self.mirror.keep([self.path / "config.json"])
            else:
                self.mirror.lease.give_back()
            return refusal
        except UserError as error:
            return str(error)

    def _claim(self, recipe: Recipe, update: bool) -> str | None:
        """Locks the directory and writes whose it is; or says why not."""
        path, config = self.path, saved_form(recipe)
        existing = path / "config.json"
        if path.exists() and not path.is_dir():
            return f"work directory {path} is a file: choose another --workdir"
        if existing.exists():
            saved = json.loads(existing.read_text())
            if saved.get(KIND) != config[KIND]:
                return (
                    f"work directory {path} holds a config.json that is no run's (a model's?): choose another --workdir"
                )
            if (refusal := self._owned_by_another(saved, config, update)) is not None:
                return refusal
        elif not holds_nothing_else(path):
            return f"work directory {path} is not empty and holds no run (no config.json): choose another --workdir"
        path.mkdir(parents=True, exist_ok=True)
        self._lock = (path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            return f"another process is running in {path}: wait for it, or choose another --workdir"
        write_json_atomic(existing, config)
        return None

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is None:
            return
        try:
            if self.mirror is not None:
                self.mirror.keep_small()
                self.mirror.lease.give_back()
        finally:
            self._lock.close()

    def keep(self, *names: str) -> None:
        """What no station has as its output: in the store too, if the directory is in one."""
        if self.mirror is not None:
            self.mirror.keep(self.path / name for name in names)

    def _owned_by_another(self, saved: dict, config: dict, update: bool) -> str | None:
        changes = differences(saved, config)
        # Until something was evaluated there is nothing to lose: a recipe that was wrong can be mended in its place.
        if not changes or update or not (self.path / "eval.json").exists():
            return None
        shown = "; ".join(changes[:5]) + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")
        return (
            f"work directory {self.location} belongs to another recipe ({shown}): choose another --workdir, "
            f"pass --update to go on with the new one, or go on with its own: cpt run {self.location}/config.json --workdir {self.location}"
        )

    def station(
        self,
        name: str,
        inputs: object,
        outputs: Sequence[Path],
        build: Callable[[], None],
        *,
        together: bool = False,
        beside: str | None = None,
        everywhere: bool = True,
        common: bool = False,
        changeable: object = None,
        sources: Mapping[str, str] | None = None,
    ) -> str:
        """Makes sure that a station is done, and returns its fingerprint (for the inputs of those that follow). Of several
        processes the first does it, and all others wait, or all do it `together`.

        Args:
          inputs: JSON of all that decides the outputs, the fingerprints of earlier stations among it.
          outputs: what it writes: removed before it is begun with other inputs, kept when it is continued.
          build: does the work; may find outputs of an interrupted try with the same inputs.
          beside: a pattern of files beside the first output that belong to it.
          everywhere: whether other processes need the outputs.
          common: whether runs of a sweep may have it in common.
          changeable: JSON of what decides them too, of which another may be given while it is under way: it is
            continued then. Once it is done it is made anew.
          sources: fingerprints of what it reads from, by name: while it is under way others may join, and one that is
            not as it was begins it anew.
        """
        begun = self.begin(name, inputs, outputs, everywhere=everywhere, changeable=changeable, sources=sources)
        if begun.done:
            return begun.fingerprint
        shared = self.shared if common else None
        with contextlib.nullcontext() if shared is None else shared.turn(name, begun.fingerprint):
            if shared is not None and shared.take(name, begun.fingerprint, self.path):
                self._found_done.add(name)
            elif processes.is_first() or together:
                build()
            self.end(begun, beside=beside, everywhere=everywhere)
            if shared is not None:
                shared.give(name, begun.fingerprint, self.path, self._files(begun, beside))
        return begun.fingerprint

    def begin(
        self,
        name: str,
        inputs: object,
        outputs: Sequence[Path],
        *,
        everywhere: bool = True,
        changeable: object = None,
        sources: Mapping[str, str] | None = None,
    ) -> "Begun":
        """The first half of `station`: whether it is done, and if not, it is begun, and `end` is to follow."""
        # Files have other times on other hosts: the first process's count.
        content, sources = _given(inputs), dict(sources or {})
        changes = {"changeable": changeable, "sources": sources}
        expected = processes.told(fingerprint(content if changeable is None else content | changes))
        fixed = processes.told(fingerprint(content))
        first = processes.is_first()
        found = self._mark(name) if first else {}
        same = found.get("fingerprint") == expected
        as_they_were = all(sources.get(each, mark) == mark for each, mark in found.get("sources", {}).items())
        if first and not same and found.get("fixed") == fixed and not found["done"] and as_they_were:
            same = True
            say(f"{name}: goes on with what was changed of its mixture, limits or watch")
            self.journal.write("changed", station=name)
        elif found and not same:
            say(f"{name}: made anew, what it follows from is not as it was")
        before = found.get("seconds", 0.0) if same else 0.0
        if processes.told(first and same and found["done"] and self._has(found, outputs)):
            self._fetch_for_others(found, outputs, everywhere)
            self.seconds[name] = before
            self._found_done.add(name)
            return Begun(name, expected, fixed, outputs, True, before, time.monotonic())
        if not processes.told(same):
            self._remove(outputs)
        under_way = {"fingerprint": expected, "fixed": fixed, "sources": sources, "done": False, "seconds": before}
        self._write_mark(name, under_way)
        processes.wait(f"{name} begins")
        if self._started is not None:
            self.journal.write("run", started=self._started)
            self._started = None
        self.journal.write("begin", station=name)
        return Begun(name, expected, fixed, outputs, False, before, time.monotonic())

    def end(self, begun: "Begun", *, beside: str | None = None, everywhere: bool = True) -> None:
        """Marks a station as done whose outputs are there."""
        name, outputs = begun.name, begun.outputs
        processes.wait(f"{name} is done")
        self.journal.write("done", station=name)
        self.seconds[name] = begun.seconds_before + time.monotonic() - begun.started
        mark = {"fingerprint": begun.fingerprint, "fixed": begun.fixed, "done": True, "seconds": self.seconds[name]}
        if processes.is_first() and self.mirror is not None:
            mark["files"] = self.mirror.keep(self._files(begun, beside))
        self._write_mark(name, mark)
        self._fetch_for_others(mark, outputs, everywhere)

    def _files(self, begun: "Begun", beside: str | None) -> list[Path]:
        return [*begun.outputs, *(begun.outputs[0].parent.glob(beside) if beside else ())]

    def _mark(self, name: str) -> dict:
        mark = self.path / MARKS / f"{name}.json"
        return json.loads(mark.read_text()) if mark.exists() else {}

    def _write_mark(self, name: str, content: dict) -> None:
        if not processes.is_first():
            return
        mark = self.path / MARKS / f"{name}.json"
        write_json_atomic(mark, content)
        if self.mirror is not None:
            self.mirror.keep([mark])

    def _has(self, mark: dict, outputs: Sequence[Path]) -> bool:
        if self.mirror is None:
            return all(path.exists() for path in outputs)
        return self.mirror.fetch(mark["files"], outputs)

    def _fetch_for_others(self, mark: dict, outputs: Sequence[Path], everywhere: bool) -> None:
        """What the first process has is on the others' disks too, where they have their own."""
        if self.mirror is None or not everywhere:
            return
        files = processes.told(mark.get("files"))
        if not processes.is_first():
            self.mirror.fetch(files, outputs)

    def _remove(self, outputs: Sequence[Path]) -> None:
        if processes.is_first() or self.mirror is not None:
            for path in outputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if processes.is_first() and self.mirror is not None:
            self.mirror.remove(outputs)

    def fetch_done(self) -> None:
        """Has the outputs of all stations that are done on this machine."""
        if self.mirror is None:
            return
        for mark in (self.path / MARKS).glob("*.json"):
            content = json.loads(mark.read_text())
            if not content["done"]:
                continue
            self.mirror.fetch(content["files"], [])
            for stage in {Path(name).parent for name in content["files"] if name.startswith("stages/")}:
                self.mirror.checkpoints(self.path / stage, Keep()).fetch(is_trained)

    def is_done(self, name: str) -> bool:
        """Whether a station was finished at its last try, with whatever inputs."""
        return self._mark(name).get("done", False)

    def is_made_of(self, name: str, inputs: object) -> bool:
        """Whether a station was finished at its last try, with these inputs."""
        return self.is_done(name) and self._mark(name)["fingerprint"] == fingerprint(_given(inputs))

    def was_done(self, name: str) -> bool:
        """Whether a station was found done, and nothing was computed."""
        return name in self._found_done
