"""Checkpoints with the SHA-256 of their files.

orbax does not tell damaged arrays: of 24 single bits flipped in the two data files of a checkpoint, 20 gave other
numbers without an error (benchmarks/damaged_bits.py).
"""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import orbax.checkpoint as ocp

from cpt_jax.core.checksums import checksums, difference

CHECKSUMS = "checksums.json"
# orbax writes these when the checkpoint gets its name.
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


class Checksummed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint that is being written: its checksums are written before it gets its name, so that none is without
    them. It happens in the background, in the first process, when all have written their part."""

    async def finalize(self) -> None:
        await asyncio.to_thread(_write_checksums, Path(self.get()))
        await super().finalize()


def _write_checksums(directory: Path) -> None:
    files = [path for path in directory.rglob("*") if path.is_file() and path.relative_to(directory).name not in LATER]
    (directory / CHECKSUMS).write_text(json.dumps(checksums(directory, files), indent=1))


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None: they are what was written."""
    listed = checkpoint / CHECKSUMS
    if not listed.is_file():
        return f"{CHECKSUMS} is missing"
    try:
        expected = json.loads(listed.read_text())
    except ValueError:
        return f"{CHECKSUMS} cannot be read"
    return difference(checkpoint, expected)


def steps(directory: Path) -> Sequence[int]:
    """Of the checkpoints that are there, the newest first."""
    found = [int(path.name) for path in directory.glob("*") if path.name.isdigit()]
    return sorted(found, reverse=True)
