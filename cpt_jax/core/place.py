"""Where files are put whole: a local directory, or one in a store."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cpt_jax.core.storage import disk_full_is_told, write_bytes_atomic
from cpt_jax.core.stores import Location, Store, is_address, size_of


class Place:
    """A directory of files by their names, local or in a store. A name that is there stands for a whole file."""

    def __init__(self, location: Location) -> None:
        self._store = Store(str(location)) if is_address(location) else None
        self._path = Path(location)
        self._location = location

    def read(self, name: str) -> bytes | None:
        """None: there is no such file."""
        if self._store is not None:
            return self._store.read(name)
        path = self._path / name
        return path.read_bytes() if path.is_file() else None

    def write(self, name: str, content: bytes) -> None:
        if self._store is not None:
            self._store.write(name, content)
        else:
            write_bytes_atomic(self._path / name, content)

    def size(self, name: str) -> int | None:
        """In bytes; None: there is no such file."""
        if self._store is None and not (self._path / name).is_file():
            return None
        if self._store is not None and self._store.names(name) == []:
            return None
        return size_of(f"{self._location}/{name}" if self._store is not None else self._path / name)

    @contextlib.contextmanager
    def written(self, name: str) -> Iterator[Path]:
        """A local path to write at; the file gets its name when all of it was written."""
        if self._store is not None:
            with tempfile.TemporaryDirectory(prefix="cpt-") as root:
                path = Path(root) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                yield path
                self._store.upload(Path(root), [path])
            return
        path = self._path / name
        partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with disk_full_is_told(path):
                yield partial
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def local(self, names: list[str]) -> Iterator[list[Path]]:
        """Local files of these names, fetched if they are in a store."""
        if self._store is None:
            yield [self._path / name for name in names]
            return
        with tempfile.TemporaryDirectory(prefix="cpt-") as root:
            for name in names:
                (Path(root) / name).parent.mkdir(parents=True, exist_ok=True)
                if (content := self._store.read(name)) is not None:
                    (Path(root) / name).write_bytes(content)
            yield [Path(root) / name for name in names]

    def names(self) -> list[str]:
        """Of all files, sorted."""
        if self._store is not None:
            return self._store.names()
        found = (path for path in self._path.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self._path)) for path in found)

    def remove(self, name: str) -> None:
        """A file, or all below a directory, if there is one."""
        if self._store is not None:
            self._store.remove(name)
        elif (path := self._path / name).is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
