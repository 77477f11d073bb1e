"""SHA-256 of files: what was written is what is read."""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Hashing releases the interpreter: one thread reaches some 1.5 GB/s.
_THREADS = 8


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(directory: Path, files: Iterable[Path]) -> dict[str, str]:
    """Of files below `directory`, by their path relative to it."""
    names = sorted(files)
    with ThreadPoolExecutor(_THREADS) as pool:
        return {
            str(path.relative_to(directory)): found for path, found in zip(names, pool.map(sha256, names), strict=True)
        }


def difference(directory: Path, expected: Mapping[str, str]) -> str | None:
    """What is wrong with the files below `directory`, the first of them by name; None: nothing is.

    A file that is not expected is not looked at.
    """
    for name in expected:
        if not (directory / name).is_file():
            return f"{name} is missing"
    found = checksums(directory, [directory / name for name in expected])
    wrong = [name for name in sorted(expected) if found[name] != expected[name]]
    return f"{wrong[0]} is not what was written (SHA-256)" if wrong else None
