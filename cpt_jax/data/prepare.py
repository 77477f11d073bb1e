"""A corpus tokenised once, into sharded ArrayRecord files with a manifest.

A record is one document's token ids, little-endian uint32, without start and end tokens: those belong to the packing.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import disk_full_is_told, write_json_atomic
from cpt_jax.data.sources import SkipCounts

BATCH_DOCUMENTS = 1024
SHARD_TOKENS = 50_000_000
MANIFEST = "manifest.json"


class Encoder(Protocol):
    """What preparation needs of a tokenizer."""

    fingerprint: Any

    def encode_documents(self, texts: list[str]) -> list[list[int]]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared domain holds: counts, what was skipped and why, the tokenizer, and each shard's SHA-256."""

    name: str
    records: int
    bytes: int
    characters: int
    tokens: int
    skipped: dict[str, int]
    tokenizer: str
    shards: dict[str, str]


def encode_record(tokens: list[int]) -> bytes:
    return np.asarray(tokens, "<u4").tobytes()


def decode_record(record: bytes) -> np.ndarray:
    """Token ids [n], int32."""
    return np.frombuffer(record, "<u4").astype(np.int32)


def _encoded(texts: Iterator[str], tokenizer: Encoder) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Batches of texts and their tokens; while one is written, the next is encoded."""
    with ThreadPoolExecutor(1) as pool:
        batch: list[str] = []
        coming = None
        while following := list(itertools.islice(texts, BATCH_DOCUMENTS)):
            pending, coming = coming, pool.submit(tokenizer.encode_documents, following)
            if pending is not None:
                yield batch, pending.result()
            batch = following
        if coming is not None:
            yield batch, coming.result()


def prepare(
    name: str,
    texts: Iterator[str],
    skipped: SkipCounts,
    tokenizer: Encoder,
    directory: Path,
    on_progress: Callable[[int], None] = lambda documents: None,
) -> Manifest:
    """Tokenises `texts` into `directory`/train-NNNNN.arrayrecord and writes manifest.json last.

    Raises:
      UserError: there is no text, or the disk is full.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    directory.mkdir(parents=True, exist_ok=True)
    for left_over in (*directory.glob("train-*"), directory / MANIFEST):
        left_over.unlink(missing_ok=True)
    records = size = characters = tokens = in_shard = 0
    paths: list[Path] = []
    writer = None
    with disk_full_is_told(directory):
        for batch, encoded in _encoded(texts, tokenizer):
            if writer is None or in_shard >= SHARD_TOKENS:
                if writer is not None:
                    writer.close()
                paths.append(directory / f"train-{len(paths):05d}.arrayrecord")
                # Groups of one record: training reads documents one by one, in random order.
                writer, in_shard = ArrayRecordWriter(str(paths[-1]), "group_size:1"), 0
            for text, ids in zip(batch, encoded, strict=True):
                writer.write(encode_record(ids))
                records, size, characters, tokens = (
                    records + 1,
                    size + len(text.encode()),
                    characters + len(text),
                    tokens + len(ids),
                )
                in_shard += len(ids)
            on_progress(records)
        if writer is not None:
            writer.close()
    if not records:
        raise UserError(f"domain {name!r} has no text to train on: everything was skipped ({dict(skipped)})")
    manifest = Manifest(
        name=name,
        records=records,
        bytes=size,
        characters=characters,
        tokens=tokens,
        skipped=dict(skipped),
        tokenizer=tokenizer.fingerprint,
        shards={path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths},
    )
    write_json_atomic(directory / MANIFEST, dataclasses.asdict(manifest))
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a prepared domain.

    Raises:
      UserError: there is none: the domain is not, or not wholly, prepared.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise UserError(f"{directory} is not prepared (no {MANIFEST}): run `cpt data prepare`")
    return Manifest(**json.loads(path.read_text()))
