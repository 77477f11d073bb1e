"""Directories in object stores (s3://, gs://, and whatever else fsspec knows), beside local ones."""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any

from cpt_jax.core.checksums import checksums, sha256
from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import disk_full_is_told, write_json_atomic

# Files fetched at a time: most are small, and waited for more than transferred.
_AT_ONCE = 16
# A local path, or an address in a store: as a Path, s3:// would lose a slash.
Location = Path | str


def is_address(location: Location) -> bool:
    return isinstance(location, str) and "://" in location


def location(text: str) -> Location:
    """What is typed on a command line."""
    return text.rstrip("/") if "://" in text else Path(text)


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it.

    Raises:
      UserError: there is no such kind of store, or its package is not installed.
    """
    import fsspec

    # It logs what it raises, with a traceback, unless GCSFS_DEBUG says how much.
    if not (log := logging.getLogger("gcsfs")).level:
        log.setLevel(logging.CRITICAL)
    try:
        return fsspec.url_to_fs(address, use_listings_cache=False)
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs"}.get(address.partition(":")[0], str(error))
        raise UserError(f"{address}: its kind of store needs a package: pip install {package}") from error
    except ValueError as error:
        raise UserError(f"{address}: {error}: give a path, s3://BUCKET/... or gs://BUCKET/...") from error


@contextlib.contextmanager
def refusals_are_told(address: str) -> Iterator[None]:
    """Turns what a store answers into a UserError that names the address."""
    try:
        yield
    except UserError:
        raise
    # Each store has exceptions of its own: botocore's and gcsfs's are no OSErrors.
    except Exception as error:
        raise UserError(
            f"{address} cannot be reached ({type(error).__name__}: {error}): check the address, your credentials and the network"
        ) from error


class Store:
    """A directory in an object store; names are relative to it, with slashes."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._files, self._root = file_system(self.address)

    def below(self, name: str) -> "Store":
        return Store(f"{self.address}/{name}")

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def names(self, below: str = "") -> list[str]:
        """Of all files, sorted."""
        return sorted(str(PurePosixPath(found).relative_to(self._root)) for found in self._files.find(self._at(below)))

    def read(self, name: str) -> bytes | None:
        """None: there is no such file."""
        try:
            return self._files.cat_file(self._at(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        self._files.pipe_file(self._at(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file unless there is one; whether it was written."""
        try:
            self._files.pipe_file(self._at(name), content, mode="create")
        except FileExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        """A file, or all below a directory, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm(self._at(name), recursive=True)

    def upload(self, directory: Path, files: Iterable[Path], below: str = "") -> dict[str, str]:
        """Puts files of a local directory under the same names; SHA-256 by name."""
        found = sorted(files)
        listed = checksums(directory, found)
        if found:
            prefix = f"{below}/" if below else ""
            self._files.put([str(path) for path in found], [self._at(prefix + name) for name in listed])
        return listed

    def fetch(self, directory: Path, listed: Mapping[str, str], below: str = "") -> list[str]:
        """Makes a local directory hold files of these names and SHA-256; what is there is not fetched again.

        Returns:
          The names of those that the store does not have, or not as they were.
        """
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            there = pool.map(lambda name: self._fetched(directory, name, listed[name], below), listed)
            return [name for name, is_there in zip(listed, there, strict=True) if not is_there]

    def copy(self, directory: Path, names: Iterable[str]) -> None:
        """Puts files of these names, as they are in the store, under the same names into a local directory."""

        def one(name: str) -> None:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            with disk_full_is_told(directory / name):
                self._files.get_file(self._at(name), str(directory / name))

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(one, names))

    def _fetched(self, directory: Path, name: str, digest: str, below: str) -> bool:
        path = directory / name
        if _is(path, digest):
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        try:
            with disk_full_is_told(path):
                self._files.get_file(self._at(f"{below}/{name}" if below else name), str(partial))
        except FileNotFoundError:
            return False
        if not _is(partial, digest):
            partial.unlink()
            return False
        partial.replace(path)
        return True


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


def cache_of(address: str) -> Path:
    """A local directory for copies of what is in a store, whose last part is the address's."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    key = hashlib.sha256(address.encode()).hexdigest()[:16]
    return caches / "cpt_jax" / "stores" / key / (re.sub(r"[^\w.-]", "-", address.rpartition("/")[2]) or "root")


def open_binary(file: Location) -> IO[bytes]:
    """A file, to be read from its beginning to its end."""
    if not is_address(file):
        return Path(file).open("rb")
    files, path = file_system(str(file))
    return files.open(path, "rb")


def glob_addresses(pattern: str) -> list[str]:
    """Addresses of the files in a store that a pattern names, sorted."""
    files, path = file_system(pattern)
    with refusals_are_told(pattern):
        found = files.glob(path)
        return sorted(files.unstrip_protocol(each) for each in found if files.isfile(each))


def size_of(file: Location) -> int:
    """A file's bytes, on a disk or in a store."""
    return state_of(str(file))[1] if is_address(file) else Path(file).stat().st_size


def state_of(address: str) -> list:
    """What tells whether a file in a store is still the one that was read: its size, and the store's mark of its
    content or its time."""
    files, path = file_system(address)
    with refusals_are_told(address):
        found = files.info(path)
    mark = next(
        (
            found[key]
            for key in ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "created")
            if key in found
        ),
        None,
    )
    return [address, found["size"], str(mark)]


@contextlib.contextmanager
def _stand_in(address: str) -> Iterator[Path]:
    """A local path for a directory in a store, with its last two names, gone afterwards: errors name the address."""
    root = Path(tempfile.mkdtemp(prefix="cpt-"))
    local = root.joinpath(*PurePosixPath(address.partition("://")[2]).parts[-2:])
    local.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield local
    except UserError as error:
        raise UserError(str(error).replace(str(local), address)) from error
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def read_from(directory: Location, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """A local directory to read: `directory` itself, or a copy of the files in the store whose names are wanted.

    Raises:
      UserError: the store cannot be reached; and those of the body, with the address instead of the copy's path.
    """
    if not is_address(directory):
        yield Path(directory)
        return
    store = Store(str(directory))
    with _stand_in(store.address) as local:
        local.mkdir(exist_ok=True)
        with refusals_are_told(store.address):
            store.copy(local, filter(wanted, store.names()))
        yield local


@contextlib.contextmanager
def fetched(file: Location) -> Iterator[Path]:
    """A local file to read: `file` itself, or a copy of it; a path where nothing is if the store has no such file."""
    if not is_address(file):
        yield Path(file)
        return
    place, _, name = str(file).rpartition("/")
    with _stand_in(place) as local:
        local.mkdir(exist_ok=True)
        with refusals_are_told(str(file)), contextlib.suppress(FileNotFoundError):
            Store(place).copy(local, [name])
        yield local / name


def refuse_existing(out: Location) -> None:
    """Before a command writes a directory of its own, which would replace what is there.

    Raises:
      UserError: there is something at `out`.
    """
    if is_address(out):
        with refusals_are_told(str(out)):
            there = bool(Store(str(out)).names())
    else:
        there = Path(out).exists()
    if there:
        raise UserError(f"{out} exists: give another --out, or remove it first")


@contextlib.contextmanager
def written_to(out: Location) -> Iterator[Path]:
    """A local path to write a directory at: `out` itself, or one whose files are in the store afterwards, where nothing is
    (`refuse_existing`)."""
    if not is_address(out):
        yield Path(out)
        return
    store = Store(str(out))
    with _stand_in(store.address) as local:
        yield local
        _put(store, local)


@contextlib.contextmanager
def written_beside(out: Location) -> Iterator[Path]:
    """A local path to write a file at, and others beside it: `out` itself, or one after which all are in the store."""
    if not is_address(out):
        yield Path(out)
        return
    place, _, name = str(out).rpartition("/")
    with _stand_in(place) as local:
        yield local / name
        _put(Store(place), local)


def _put(store: Store, local: Path) -> None:
    with refusals_are_told(store.address):
        store.upload(local, (path for path in local.rglob("*") if path.is_file()))


def write_json(out: Location, value: object) -> None:
    """Writes a JSON file, on a disk or in a store, whole or not at all."""
    with written_beside(out) as path:
        write_json_atomic(path, value)
