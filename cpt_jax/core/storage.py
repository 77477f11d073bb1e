"""Files that are whole or not there: written beside their place and renamed into it."""

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from cpt_jax.core.errors import UserError

# Of a name that files are named after: file systems take 255, and something is written before and behind it.
MOST_BYTES = 200


def is_file_name(name: str) -> bool:
    """Whether files and directories can be named after it."""
    return (
        name not in ("", ".", "..")
        and not {"/", "\0"} & {*name}
        and len(name.encode(errors="surrogatepass")) <= MOST_BYTES
    )


@contextlib.contextmanager
def disk_full_is_told(path: Path) -> Iterator[None]:
    """Turns "no space left" into a UserError that says where; earlier files are as they were."""
    try:
        yield
    except Exception as error:
        if not _says_full(error):
            raise
        raise UserError(
            f"the disk is full while writing {path}: free some space and run the same command again"
        ) from error


def _says_full(error: Exception) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in codes
    # TensorStore's, a ValueError; riegeli's, a RuntimeError.
    marks = (*(f"os_error_code='{code}'" for code in codes), *(os.strerror(code) for code in codes))
    return any(mark in str(error) for mark in marks)


def write_text_atomic(path: Path, text: str) -> None:
    """Writes a text file whole or not at all (UTF-8; what is none, in a file's name, is escaped)."""
    write_bytes_atomic(path, text.encode(errors="backslashreplace"))


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # Two processes may write the same file: the second waits. What a killed one has left is written over.
    with locked(partial) as file:
        try:
            with disk_full_is_told(path):
                file.truncate(0)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[IO[bytes]]:
    """A file that nobody else holds meanwhile, made if there is none. Who holds it may remove or rename it.

    Raises:
      BlockingIOError: another holds it, who is not to be waited for.
    """
    while True:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise
            except OSError:
                # A file system without locks.
                pass
            if _is_at(file, path):
                yield file
                return


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def write_json_atomic(path: Path, value: object) -> None:
    """Writes a JSON file whole or not at all."""
    write_bytes_atomic(path, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """What a JSON file holds. A figure that is no finite number is null, for which JSON has no other word; what is no UTF-8,
    in a file's name, is escaped."""
    text = json.dumps(_finite(value), ensure_ascii=False, indent=2, allow_nan=False)
    return (text + "\n").encode(errors="backslashreplace")


def json_line(value: Mapping[str, Any]) -> str:
    """The same, of an object in a line of its own."""
    return json.dumps(_finite(value), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as they were before they were written, but for their infinities: what is null is NaN again."""
    return {name: math.nan if value is None else value for name, value in figures.items()}


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that holds one a line, in order: [] without a file, and without lines that were cut off."""
    return objects_in(path.read_text()) if path.exists() else []


def objects_in(text: str) -> list[dict[str, Any]]:
    """The objects of a text that holds one a line, without lines that were cut off."""
    objects = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            objects.append(json.loads(line))
    return objects


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A directory to write into, which appears at `path` (replacing what is there) once all of it was written."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with disk_full_is_told(path):
            partial.mkdir(parents=True)
            yield partial
            replace_directory(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_directory(new: Path, path: Path) -> None:
    """Moves a directory to `path`. What is there is removed once the new one has its place, and stays where that fails."""
    old = path.with_name(path.name + ".replaced")
    try:
        if path.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            path.replace(old)
        new.replace(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.replace(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
