"""The records of a prepared domain, one by one, and what is done about those that cannot be read."""

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, SupportsIndex

from array_record.python.array_record_module import ArrayRecordReader

from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import say
from cpt_jax.data.prepare import Manifest

# Stop and say which, or go on without them and count.
Unreadable = Literal["stop", "skip"]


def shard_fault(directory: Path, manifest: Manifest, name: str) -> str | None:
    """What is wrong with a shard as a file, told by its size; None: nothing is."""
    path, shard = directory / name, manifest.shards[name]
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != shard.bytes:
        kind = "truncated" if size < shard.bytes else "too long"
        return f"{path} is {kind}: {size:,} bytes of {shard.bytes:,}"
    return None


class Records:
    """Record n of all shards, or None where it cannot be read and that is skipped.

    A record keeps its number whatever is skipped: the order of the others stays as it is. A shard whose size is wrong is
    found at the start, a record whose bytes are wrong (riegeli's checksum) when it is read.

    Raises:
      UserError: a shard, or later a record, cannot be read, and `unreadable` is "stop".
    """

    def __init__(self, directory: Path, manifest: Manifest, unreadable: Unreadable) -> None:
        self._directory, self._manifest, self._unreadable = directory, manifest, unreadable
        self.skipped: set[int] = set()
        self._names = sorted(manifest.shards)
        counts = [manifest.shards[name].records for name in self._names]
        self._first = list(itertools.accumulate(counts, initial=0))
        self._sources = [self._opened(index) for index in range(len(self._names))]
        if all(source is None for source in self._sources):
            raise UserError(
                f"{directory}: no shard of {manifest.name} can be read: remove it to have it prepared again"
            )

    def _opened(self, index: int) -> ArrayRecordReader | None:
        name, first, behind = self._names[index], self._first[index], self._first[index + 1]
        fault = shard_fault(self._directory, self._manifest, name)
        if fault is None:
            # Records are read in random order: nothing is read ahead.
            return ArrayRecordReader(
                str(self._directory / name), "readahead_buffer_size:0", file_reader_buffer_size=32768
            )
        self._tell(f"{fault} (documents {first:,} to {behind - 1:,} of {self._manifest.name})")
        return None

    def _tell(self, fault: str) -> None:
        if self._unreadable == "stop":
            raise UserError(
                f"{fault}: put it back, remove {self._directory} to have it prepared again, or go on without "
                "(--unreadable skip)"
            )
        say(f"skipped: {fault}")

    def __len__(self) -> int:
        return self._first[-1]

    def read(self, numbers: Sequence[int]) -> list[bytes | None]:
        """Several records: a call of its own for each takes 20 times as long."""
        found: list[bytes | None] = [None] * len(numbers)
        by_shard: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            by_shard.setdefault(bisect.bisect_right(self._first, number) - 1, []).append(place)
        for shard, places in by_shard.items():
            source, first = self._sources[shard], self._first[shard]
            try:
                if source is None:
                    raise OSError
                records = source.read([numbers[place] - first for place in places])
            except (RuntimeError, OSError):
                # One by one, to tell which.
                records = [self[numbers[place]] for place in places]
            for place, record in zip(places, records, strict=True):
                found[place] = record
        return found

    def __getitem__(self, key: SupportsIndex) -> bytes | None:
        number = key.__index__()
        shard = bisect.bisect_right(self._first, number) - 1
        source, record = self._sources[shard], number - self._first[shard]
        if source is not None:
            try:
                return source.read([record])[0]
            # riegeli's; OSError where the disk fails.
            except (RuntimeError, OSError) as error:
                if number not in self.skipped:
                    reason = str(error).partition(";")[0].partition(" (computed")[0] or type(error).__name__
                    self._tell(
                        f"{self._directory / self._names[shard]}, record {record:,} (document {number:,} of "
                        f"{self._manifest.name}) cannot be read: {reason}"
                    )
        self.skipped.add(number)
        return None

    def __repr__(self) -> str:
        return str(self._directory)
