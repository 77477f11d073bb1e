"""What several runs have in common, computed once: the outputs of their stations, by fingerprint, in one directory."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from cpt_jax.checkpoint.base import resolve_base
from cpt_jax.core.config import fingerprint
from cpt_jax.core.storage import atomic_directory

# Beside the outputs of a station: their names in a run's directory.
_FILES = "files"


class SharedStations:
    """A directory that holds, for each station and fingerprint, what the first run that came to it made; the others link
    it into theirs. A file there is never written to: it is replaced, or another one is made.

    Runs of other processes of this machine, or of others that see the directory, may use it too: whoever comes second
    waits for the first.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def _place(self, name: str, key: str) -> Path:
        return self.directory / f"{name}-{key[:16]}"

    @contextlib.contextmanager
    def turn(self, name: str, key: str) -> Iterator[None]:
        """Returns when no other process is at this station."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._place(name, key).with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def take(self, name: str, key: str, run: Path) -> bool:
        """Links a station's outputs into a run's directory; False: no run has made them yet."""
        place = self._place(name, key) / _FILES
        if not place.is_dir():
            return False
        _link_files(place, [place], run)
        return True

    def give(self, name: str, key: str, run: Path, outputs: Iterable[Path]) -> None:
        """Has the outputs of a run's station for the others, unless they are there."""
        if not (place := self._place(name, key)).exists():
            with atomic_directory(place) as partial:
                _link_files(run, outputs, partial / _FILES)

    def source(self, base: str) -> Path:
        """The base as a model directory (`resolve_base`): itself, or made here once."""
        with self.turn("source", key := fingerprint(base)):
            return resolve_base(base, self._place("source", key))

    def base(self, base: str, cache: Path) -> None:
        """Links a base that had to be made into a run's `cache`."""
        found = self.source(base)
        if found.is_relative_to(self.directory) and not cache.exists():
            with atomic_directory(cache) as partial:
                _link_files(found, [found], partial)


def _link_files(root: Path, paths: Iterable[Path], out: Path) -> None:
    """Files, and all files of directories, under the same names below another directory."""
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if not file.is_file():
                continue
            target = out / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(file, target)
            except OSError:
                shutil.copy2(file, target)
