"""A corpus tokenised once, into sharded ArrayRecord files with a manifest.

A record is one document's token ids, little-endian uint32, without start and end tokens: those belong to the packing.
The highest bit of a token that is not to be learnt (a conversation's prompt) is set.
"""

import collections
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cpt_jax.core.checksums import sha256
from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import disk_full_is_told, write_json_atomic
from cpt_jax.data.sources import Format, SkipCounts

BATCH_DOCUMENTS = 1024
SHARD_TOKENS = 50_000_000
MANIFEST = "manifest.json"
NOT_LEARNT = 1 << 31


class Encoder(Protocol):
    """What preparation needs of a tokenizer."""

    fingerprint: Any

    def encode_documents(self, documents: list[Any], /) -> Sequence[Sequence[int] | np.ndarray]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of records as it was written."""

    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared domain holds: counts (`trained_tokens`: those that are learnt), what was skipped and why, the
    tokenizer, and each shard by its file's name."""

    name: str
    format: Format
    records: int
    bytes: int
    characters: int
    tokens: int
    trained_tokens: int
    skipped: dict[str, int]
    tokenizer: str
    shards: dict[str, Shard]


def encode_record(tokens: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(tokens, "<u4").tobytes()


def decode_record(record: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n], int32, and which of them are to be learnt [n], bool."""
    tokens = np.frombuffer(record, "<u4")
    return (tokens & (NOT_LEARNT - 1)).astype(np.int32), tokens < NOT_LEARNT


def _encoded(documents: Iterator[Any], encoder: Encoder) -> Iterator[tuple[list[Any], Sequence[Any]]]:
    """Batches of documents and their tokens; while one is written, the next is encoded."""
    with ThreadPoolExecutor(1) as pool:
        batch: list[Any] = []
        coming = None
        while following := list(itertools.islice(documents, BATCH_DOCUMENTS)):
            pending, coming = coming, pool.submit(encoder.encode_documents, following)
            if pending is not None:
                yield batch, pending.result()
            batch = following
        if coming is not None:
            yield batch, coming.result()


def prepare(
    name: str,
    documents: Iterator[Any],
    skipped: SkipCounts,
    encoder: Encoder,
    directory: Path,
    on_progress: Callable[[int], None] = lambda documents: None,
    *,
    format: Format = "text",
) -> Manifest:
    """Tokenises texts, or renderings of conversations, into `directory`/train-NNNNN.arrayrecord and writes
    manifest.json last.

    Raises:
      UserError: there is nothing to learn, or the disk is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for left_over in (*directory.glob("train-*"), directory / MANIFEST):
        left_over.unlink(missing_ok=True)
    counts: collections.Counter[str] = collections.Counter()
    with disk_full_is_told(directory), _Shards(directory) as shards:
        for batch, encoded in _encoded(documents, encoder):
            for document, ids in zip(batch, encoded, strict=True):
                text, tokens = document if isinstance(document, str) else document.text, np.asarray(ids, "<u4")
                shards.write(tokens)
                counts["records"] += 1
                counts["bytes"] += len(text.encode())
                counts["characters"] += len(text)
                counts["tokens"] += len(tokens)
                counts["trained_tokens"] += int((tokens < NOT_LEARNT).sum())
            on_progress(counts["records"])
    if not counts["trained_tokens"]:
        raise UserError(f"domain {name!r} has no text to train on: everything was skipped ({dict(skipped)})")
    manifest = Manifest(
        name=name,
        format=format,
        **counts,
        skipped=dict(skipped),
        tokenizer=encoder.fingerprint,
        shards={
            path.name: Shard(records=records, bytes=path.stat().st_size, sha256=sha256(path))
            for path, records in shards.records.items()
        },
    )
    write_json_atomic(directory / MANIFEST, dataclasses.asdict(manifest))
    return manifest


class _Shards:
    """The files that records go to, a new one after every SHARD_TOKENS tokens."""

    def __init__(self, directory: Path) -> None:
        self.records: dict[Path, int] = {}
        self._directory, self._path, self._writer, self._tokens = directory, directory, None, 0

    def __enter__(self) -> "_Shards":
        return self

    def write(self, tokens: np.ndarray) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        if self._writer is None or self._tokens >= SHARD_TOKENS:
            self._close()
            self._path = self._directory / f"train-{len(self.records):05d}.arrayrecord"
            self.records[self._path] = 0
            # Groups of one record: training reads documents one by one, in random order.
            self._writer, self._tokens = ArrayRecordWriter(str(self._path), "group_size:1"), 0
        self._writer.write(encode_record(tokens))
        self.records[self._path] += 1
        self._tokens += len(tokens)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def __exit__(self, *_: object) -> None:
        self._close()


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a prepared domain.

    Raises:
      UserError: there is none: the domain is not, or not wholly, prepared; or it is another version's.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise UserError(f"{directory} is not prepared (no {MANIFEST}): run `cpt data prepare`")
    written = json.loads(path.read_text())
    fields = {field.name for field in dataclasses.fields(Manifest)}
    if written.keys() != fields or any(isinstance(shard, str) for shard in written["shards"].values()):
        raise UserError(f"{directory} was prepared by another version of cpt_jax: run `cpt data prepare` again")
    shards = {name: Shard(**shard) for name, shard in written.pop("shards").items()}
    return Manifest(**written, shards=shards)
