"""A run's directory in an object store, and this process's copy of it.

A run works on local files. What a station wrote is uploaded when it is done, and its mark last, with the SHA-256 of its
files: a mark in the store means that its outputs are there. Several processes have a copy each.
"""

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax

from cpt_jax.checkpoint.keep import Keep
from cpt_jax.checkpoint.stored import StoredCheckpoints, as_on_disk, is_trained
from cpt_jax.core.errors import TRY_AGAIN, UserError
from cpt_jax.core.journal import JOURNAL
from cpt_jax.core.progress import say
from cpt_jax.core.stores import Location, Store, cache_of, is_address, read_from, refusals_are_told

MARKS = ".stations"
# Of a run that has no mark of its own.
SMALL = ("config.json", "eval.json", "timings.json", "report.html", JOURNAL, "plots")
LEASE = ".lease.json"
ELSEWHERE = "wait for it, or choose another --workdir"
REFRESH_SECONDS, LEASE_SECONDS = 20.0, 60.0


class Mirror:
    """The directory at an address, and its copy at `path`."""

    def __init__(self, address: str) -> None:
        self.store = Store(address)
        cache = cache_of(address)
        self.path = cache.parent / f"process-{jax.process_index()}" / cache.name
        self.lease = Lease(self.store)

    def begin(self) -> str | None:
        """Makes the copy have what is in the store, without the outputs of stations; or says why not."""
        if "config.json" not in (names := self.store.names()):
            if set(names) - {LEASE}:
                return f"{self.store.address} is not empty and holds no run (no config.json): choose another --workdir"
            # A copy of a run that is no more; a base that was fetched or converted is of use all the same.
            for path in self.path.glob("*") if self.path.exists() else ():
                if path.name not in ("source", ".lock"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(self.path / MARKS, ignore_errors=True)
        for name in names:
            if name.startswith((f"{MARKS}/", "plots/")) or name in SMALL:
                target = self.path / name
                content = self.store.read(name) or b""
                # What a run that was killed wrote there last is here only.
                if name != JOURNAL or not target.exists() or target.stat().st_size < len(content):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content)
        return None

    def keep(self, paths: Iterable[Path]) -> dict[str, str]:
        """Uploads files, and all files of directories, but checkpoints, which are there already; SHA-256 by name."""
        files = {file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()}
        return self.store.upload(
            self.path, (file for file in files if "checkpoints" not in file.relative_to(self.path).parts)
        )

    def keep_small(self) -> None:
        self.keep(self.path / name for name in SMALL if (self.path / name).exists())

    def fetch(self, files: Mapping[str, str], outputs: Sequence[Path]) -> bool:
        """Makes the copy have the outputs of a station that is done; whether the store has them."""
        if self.store.fetch(self.path, files):
            return False
        for path in outputs:
            if path.parent.name == "checkpoints":
                self.checkpoints(path.parents[1], Keep()).fetch(is_trained)
        return all(path.exists() for path in outputs)

    def remove(self, paths: Iterable[Path]) -> None:
        """From the store."""
        for path in paths:
            self.store.remove(self._name(path))

    def checkpoints(self, stage: Path, keep: Keep) -> StoredCheckpoints:
        def log() -> None:
            self.keep([self.path / JOURNAL])

        return StoredCheckpoints(self.store.below(self._name(stage)), stage, keep, log)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()


@contextlib.contextmanager
def examined(run: Location) -> Iterator[Path]:
    """A run's directory as it would be on a disk: itself, or a copy of all that is in the store but reports.

    Raises:
      UserError: another process is running in the one in a store.
    """
    if is_address(run):
        with refusals_are_told(str(run)):
            holder = Lease(Store(str(run))).holder()
        if holder is not None:
            raise UserError(f"{holder}: examine it when that has ended")
    with read_from(run, lambda name: name != LEASE and not name.startswith(("plots/", "report.html"))) as path:
        if is_address(run):
            for checkpoints in path.glob("stages/*/checkpoints"):
                as_on_disk(checkpoints)
        yield path


class Lease:
    """Says in the store that this process works on a run, again and again while it does.

    A lease that was not renewed for LEASE_SECONDS is over, and one of a process of this machine that has ended too.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._over = store, threading.Event()
        # A process's number means something in its own namespace only.
        place = (
            f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid') if os.path.exists('/proc/self/ns/pid') else ''}"
        )
        self._own = {"token": uuid.uuid4().hex, "place": place, "process": os.getpid()}

    def take(self) -> str | None:
        """None: it is this process's; or who has it. Waits for one that may be over."""
        with refusals_are_told(self._store.address):
            if not self._store.create(LEASE, self._content()):
                if (holder := self.holder()) is not None:
                    return f"{holder}: {ELSEWHERE}"
                self._store.write(LEASE, self._content())
                # Of two that found it over, the last to write has it.
                time.sleep(1.0)
                if (found := self._found()).get("token") != self._own["token"]:
                    return f"{self._told(found)}: {ELSEWHERE}"
        threading.Thread(target=self._renew, name="lease", daemon=True).start()
        return None

    def _content(self) -> bytes:
        return json.dumps(self._own | {"at": time.time()}).encode()

    def _found(self) -> dict:
        return json.loads(self._store.read(LEASE) or b"{}")

    def _told(self, found: dict) -> str:
        return (
            f"another process ({found.get('place', '').partition(' ')[0]}, {found.get('process')}) is running in "
            f"{self._store.address}"
        )

    def holder(self) -> str | None:
        """Who has it; None as soon as it is known that nobody does."""
        first = self._found()
        if not first or (first["place"] == self._own["place"] and not _alive(first["process"])):
            return None
        waited_until = time.monotonic() + LEASE_SECONDS
        if first["place"] == self._own["place"]:
            return self._told(first)
        say(f"{self._store.address} was in use a moment ago: looking for {LEASE_SECONDS:.0f} s whether it still is")
        while time.monotonic() < waited_until:
            # By its changes, not by the time in it: clocks differ.
            if (found := self._found()) != first:
                return self._told(found) if found else None
            time.sleep(2.0)
        return None

    def _renew(self) -> None:
        while not self._over.wait(REFRESH_SECONDS):
            try:
                found = self._found()
                if found.get("token") not in (None, self._own["token"]):
                    say(f"{self._told(found)}; this one ends")
                    os._exit(TRY_AGAIN)
                self._store.write(LEASE, self._content())
            # The next time.
            except Exception as error:
                say(f"{self._store.address}: the lease could not be renewed ({type(error).__name__}: {error})")

    def give_back(self) -> None:
        self._over.set()
        if self._found().get("token") == self._own["token"]:
            self._store.remove(LEASE)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
