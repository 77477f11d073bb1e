"""A corpus tokenised once, into sharded ArrayRecord files with a manifest.

A record is one document's token ids, uint32, without start and end tokens: those belong to the packing. The highest bit
of a token that is not to be learnt (a conversation's prompt, the last one of a text that was cut) is set. TFDS reads it
too (`tfds_format`).
"""

import collections
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cpt_jax.core.checksums import sha256
from cpt_jax.core.errors import UserError
from cpt_jax.core.place import Place
from cpt_jax.core.progress import number_of
from cpt_jax.core.storage import disk_full_is_told, json_bytes
from cpt_jax.data.sources import Format
from cpt_jax.data.statistics import Statistics
from cpt_jax.data.tfds_format import array_of, dataset_files, example_of

# What is encoded at once: the encodings of a batch take some 100 bytes for each of its characters.
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 1 << 20
SHARD_TOKENS = 50_000_000
COUNTS = ["records", "bytes", "characters", "tokens", "trained_tokens"]
MANIFEST, STATISTICS = "manifest.json", "statistics.json"
NOT_LEARNT = 1 << 31
_DESCRIPTION = (
    "{records:,} documents, {tokens:,} token ids of the tokenizer {tokenizer}, prepared by cpt_jax. "
    "A token whose highest bit is set is not to be learnt."
)


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
    tokenizer, each shard by its file's name, and the fingerprint of all that it was made from, where that is known."""

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
    source: str | None

    def told(self) -> str:
        """The counts in a line."""
        left_out = ", ".join(f"{count:,} x {reason}" for reason, count in self.skipped.items()) or "none"
        learnt = f" ({self.trained_tokens:,} of them learnt)" if self.format == "chat" else ""
        documents = number_of(self.records, "document")
        return f"{documents}, {self.bytes:,} bytes, {self.tokens:,} tokens{learnt}; left out: {left_out}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """One shard as it was written: the file, counts over its documents, and what is told about them as JSON."""

    shard: Shard | None
    counts: dict[str, int]
    skipped: dict[str, int]
    statistics: dict[str, Any]


def encode_record(tokens: Sequence[int] | np.ndarray) -> bytes:
    return example_of(np.asarray(tokens, "<u4").tobytes())


def decode_record(record: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n], int32, and which of them are to be learnt [n], bool."""
    tokens = array_of(record)
    return (tokens & (NOT_LEARNT - 1)).astype(np.int32), tokens < NOT_LEARNT


def shard_name(index: int) -> str:
    return f"train-{index:05d}.arrayrecord"


def _text(document: Any) -> str:
    return document if isinstance(document, str) else document.text


def _batches(documents: Iterator[Any]) -> Iterator[list[Any]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(_text(document))
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encoded(documents: Iterator[Any], encoder: Encoder | None) -> Iterator[tuple[list[Any], Sequence[Any]]]:
    """Batches of documents and their tokens (none without an encoder); while one is written, the next is encoded."""
    if encoder is None:
        yield from ((batch, [()] * len(batch)) for batch in _batches(documents))
        return
    with ThreadPoolExecutor(1) as pool:
        batch: list[Any] = []
        coming = None
        for following in _batches(documents):
            pending, coming = coming, pool.submit(encoder.encode_documents, following)
            if pending is not None:
                yield batch, pending.result()
            batch = following
        if coming is not None:
            yield batch, coming.result()


def write_shard(
    path: Path | None,
    batches: Iterable[tuple[list[Any], Sequence[Any]]],
    skipped: Mapping[str, int],
    statistics: Statistics,
) -> Written:
    """Writes documents and their tokens to an ArrayRecord file (or nowhere, and only counts). `skipped` and `statistics`
    may grow while `batches` are read."""
    from array_record.python.array_record_module import ArrayRecordWriter

    counts = dict.fromkeys(COUNTS, 0)
    # Groups of one record: training reads documents one by one, in random order.
    writer = None if path is None else ArrayRecordWriter(str(path), "group_size:1")
    for batch, ids in batches:
        texts, tokens = list(map(_text, batch)), [np.asarray(each, "<u4") for each in ids]
        if writer is not None:
            for each in tokens:
                writer.write(encode_record(each))
        counts["records"] += len(batch)
        counts["bytes"] += sum(len(text.encode()) for text in texts)
        counts["characters"] += sum(map(len, texts))
        counts["tokens"] += sum(map(len, tokens))
        counts["trained_tokens"] += int(sum((each < NOT_LEARNT).sum() for each in tokens))
        statistics.add(texts, list(map(len, tokens)))
    shard = None
    if path is not None and writer is not None:
        writer.close()
        shard = Shard(records=counts["records"], bytes=path.stat().st_size, sha256=sha256(path))
    return Written(shard=shard, counts=counts, skipped=dict(skipped), statistics=statistics.to_json())


def write_manifest(
    place: Place, name: str, format: Format, tokenizer: str, parts: Sequence[Written], source: str | None
) -> Manifest:
    """Says what lies in a directory of shards, part n of which is shard n: statistics.json, TFDS's files, and, last,
    manifest.json."""
    counts = dict.fromkeys(COUNTS, 0)
    skipped: collections.Counter[str] = collections.Counter()
    statistics = Statistics()
    for part in parts:
        for name_of_count, count in part.counts.items():
            counts[name_of_count] += count
        skipped.update(part.skipped)
        statistics.merge(part.statistics)
    shards = {shard_name(index): part.shard for index, part in enumerate(parts) if part.shard is not None}
    manifest = Manifest(
        name=name,
        format=format,
        **counts,
        skipped=dict(sorted(skipped.items())),
        tokenizer=tokenizer,
        shards=shards,
        source=source,
    )
    description = _DESCRIPTION.format(records=manifest.records, tokens=manifest.tokens, tokenizer=tokenizer)
    records, size = {file: shard.records for file, shard in shards.items()}, sum(each.bytes for each in shards.values())
    files = {STATISTICS: json_bytes(statistics.to_json()), **dataset_files(name, description, records, size)}
    for file, content in files.items():
        place.write(file, content)
    place.write(MANIFEST, json_bytes(dataclasses.asdict(manifest)))
    return manifest


def prepare(
    name: str, documents: Iterator[Any], encoder: Encoder, directory: Path, *, format: Format = "text"
) -> Manifest:
    """Tokenises texts, or renderings of conversations, that only this process has, into an empty
    `directory`/train-NNNNN.arrayrecord, a new one after every SHARD_TOKENS tokens; manifest.json is written last.

    Raises:
      UserError: the disk is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parts: list[Written] = []
    with disk_full_is_told(directory):
        pairs = (pair for batch, ids in encoded(documents, encoder) for pair in zip(batch, ids, strict=True))
        while (first := next(pairs, None)) is not None:
            coming = _until_full(itertools.chain([first], pairs))
            parts.append(write_shard(directory / shard_name(len(parts)), coming, {}, Statistics()))
    return write_manifest(Place(directory), name, format, encoder.fingerprint, parts, None)


def _until_full(pairs: Iterator[tuple[Any, Any]]) -> Iterator[tuple[list[Any], Sequence[Any]]]:
    """Documents with their tokens, in batches, until a shard is full."""
    batch, ids, tokens = [], [], 0
    for document, each in pairs:
        batch.append(document)
        ids.append(each)
        tokens += len(each)
        if len(batch) == BATCH_DOCUMENTS or tokens >= SHARD_TOKENS:
            yield batch, ids
            batch, ids = [], []
        if tokens >= SHARD_TOKENS:
            return
    if batch:
        yield batch, ids


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a prepared domain.

    Raises:
      UserError: there is none: the domain is not, or not wholly, prepared; or it is another version's.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise UserError(f"{directory} is not prepared (no {MANIFEST}): run `cpt data prepare`")
    return manifest_of(path.read_bytes(), str(directory))


def manifest_of(content: bytes, directory: str) -> Manifest:
    """A manifest as it was written.

    Raises:
      UserError: it is another version's.
    """
    written = json.loads(content)
    fields = {field.name for field in dataclasses.fields(Manifest)}
    if written.keys() != fields or any(isinstance(shard, str) for shard in written["shards"].values()):
        raise UserError(f"{directory} was prepared by another version of cpt_jax: run `cpt data prepare` again")
    shards = {name: Shard(**shard) for name, shard in written.pop("shards").items()}
    return Manifest(**written, shards=shards)
