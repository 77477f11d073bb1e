"""The steps of preparing a corpus, each over one split, whoever does them: this process, others beside it, or other
machines. What a step leaves behind depends on the corpus and the task alone.

  look     every document is judged by itself, and its hash (and signature) kept    (only where documents are compared)
  compare  duplicates are found over all splits                                     (the same)
  write    what stays is tokenised into the split's shard
  finish   the shards are counted together
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpt_jax.core.config import fingerprint, to_json
from cpt_jax.core.errors import UserError
from cpt_jax.core.place import Place
from cpt_jax.core.storage import json_bytes
from cpt_jax.core.stores import Location
from cpt_jax.data.chat import ChatEncoder
from cpt_jax.data.chat_template import ChatTemplate, written_by
from cpt_jax.data.cleaning import Cleaning, Judge, MeasuredApart
from cpt_jax.data.duplicates import KEPT, PERMUTATIONS, REASONS, Signer, exact_duplicates, near_duplicates
from cpt_jax.data.holdout import text_hash
from cpt_jax.data.prepare import (
    MANIFEST,
    NOT_LEARNT,
    Encoder,
    Manifest,
    Shard,
    Written,
    encoded,
    manifest_of,
    shard_name,
    write_manifest,
    write_shard,
)
from cpt_jax.data.sources import Corpus, Document, SkipCounts, corpus_state, nothing_usable
from cpt_jax.data.splits import Split, read_split
from cpt_jax.data.statistics import Statistics
from cpt_jax.vocab.tokenizer import Tokenizer

# Raise it when the same task gives other shards.
FORMAT = 2
# What is there while a corpus is being prepared.
WORK = ".work"
_BEGUN = f"{WORK}/begun.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A corpus to be prepared in `place`, a directory or an address in a store.

    Args:
      tokenizer: the directory of a tokenizer; without one, documents are judged and counted, and no shard is written.
      template: a chat template other than the tokenizer's own.
      apart: documents that are only measured.
      measured: directories of held-out documents, by their domains' names, that are not to be learnt from either where
        `cleaning` says so.
      source: the fingerprint of all that decides the shards, once it is known (`identified`).
    """

    corpus: Corpus
    place: Location
    tokenizer: Path | None
    template: Path | None = None
    cleaning: Cleaning = Cleaning()
    apart: MeasuredApart | None = None
    measured: tuple[tuple[str, Path], ...] = ()
    # Tools are the same with and without it.
    source: str | None = dataclasses.field(default=None, compare=False)


class TextEncoder:
    """Documents under a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.fingerprint = tokenizer.fingerprint
        self._tokenizer = tokenizer

    def encode_documents(self, documents: list[Document]) -> list[list[int]]:
        """Token ids [tokens] of each. The last one of a truncated text, which may be a part of another token, is not to
        be learnt, nor is what the loader puts after it."""
        encoded = self._tokenizer.encode_documents([document.text for document in documents])
        for document, ids in zip(documents, encoded, strict=True):
            if document.truncated and ids:
                ids[-1] |= NOT_LEARNT
        return encoded


class Tools:
    """What a process needs for a task, made once."""

    def __init__(self, task: Task) -> None:
        self.judge = Judge(task.cleaning, task.apart, task.measured, task.corpus.text_field)
        self.tokenizer = None if task.tokenizer is None else Tokenizer(task.tokenizer)
        self._chat = None
        self.encoder: Encoder | None = None if self.tokenizer is None else TextEncoder(self.tokenizer)
        if task.corpus.format == "chat" and self.tokenizer is not None:
            self._chat = self.encoder = ChatEncoder(self.tokenizer, ChatTemplate(self.tokenizer, task.template))

    def rendered(self, documents: Iterator[Document], skipped: SkipCounts, statistics: Statistics) -> Iterator[Any]:
        """What is encoded of documents: they themselves, or the renderings of conversations."""
        return documents if self._chat is None else self._chat.rendered(documents, skipped, statistics.leave_out)


@functools.lru_cache(1)
def tools_of(task: Task) -> Tools:
    return Tools(task)


def identity(task: Task, splits: Sequence[Split]) -> str:
    """The fingerprint of all that decides the shards, but the code of a user's own filters."""
    tools, apart = tools_of(task), task.apart
    tokenizer = None if tools.tokenizer is None else tools.tokenizer.fingerprint
    template = None
    if task.corpus.format == "chat" and tools.tokenizer is not None:
        template = written_by(tools.tokenizer, task.template)
    held = None
    if apart is not None:
        hashes = hashlib.sha256((apart.directory / "heldout_hashes.bin").read_bytes()).hexdigest()
        held = [to_json(apart.holdout), hashes]
    evaluation = None if tools.judge.evaluation is None else tools.judge.evaluation.fingerprint
    cut = [[split.index, [[str(source), *stretch] for source, stretch in split.parts]] for split in splits]
    corpus, cleaning = to_json(task.corpus), to_json(task.cleaning)
    return fingerprint(
        [FORMAT, corpus, corpus_state(task.corpus), tokenizer, template, cleaning, held, evaluation, cut]
    )


def identified(task: Task, splits: Sequence[Split]) -> Task:
    """The task with its fingerprint."""
    # The same paths may hold something else by now.
    tools_of.cache_clear()
    return dataclasses.replace(task, source=identity(task, splits))


def begin(task: Task, splits: Sequence[Split]) -> Manifest | None:
    """Makes the place ready for a task: what was done of the same task stays, and what another left is removed. If all was
    done, its manifest."""
    place, expected = Place(task.place), task.source
    if (content := place.read(MANIFEST)) is not None and json.loads(content).get("source") == expected:
        manifest = manifest_of(content, str(task.place))
        if all(place.size(name) == shard.bytes for name, shard in manifest.shards.items()):
            place.remove(WORK)
            return manifest
    begun = place.read(_BEGUN)
    place.remove(MANIFEST)
    if begun is None or json.loads(begun) != expected:
        place.remove(WORK)
        for name in place.names():
            if name.startswith("train-"):
                place.remove(name)
        place.write(_BEGUN, json_bytes(expected))
    return None


def _part(kind: str, split: Split) -> str:
    return f"{WORK}/{kind}-{split.index:05d}"


def looked_at(task: Task, split: Split) -> bool:
    return Place(task.place).size(_part("judged", split)) is not None


def look(task: Task, split: Split) -> None:
    """Judges the documents of a split, and keeps the hashes, and signatures, of those that may stay."""
    place, judge = Place(task.place), tools_of(task).judge
    signer = None if task.cleaning.near_duplicates is None else Signer()
    reasons: dict[str | None, int] = {None: 0}
    judged: list[int] = []
    with contextlib.ExitStack() as stack:
        hashes = stack.enter_context(stack.enter_context(place.written(_part("hashes", split))).open("wb"))
        signatures = stack.enter_context(stack.enter_context(place.written(_part("signatures", split))).open("wb"))
        for document in read_split(task.corpus, split, SkipCounts()):
            reason = judge.reason(document)
            judged.append(reasons.setdefault(reason, len(reasons)))
            if reason is None:
                hashes.write(text_hash(document.text))
                if signer is not None:
                    signatures.write(signer.signature(document.text).astype("<u4").tobytes())
    names = [reason for reason in reasons if reason is not None]
    place.write(_part("judged", split), json_bytes({"reasons": names, "judged": judged}))


def compare(task: Task, splits: Sequence[Split]) -> None:
    """Finds the duplicates over all splits, whose hashes and signatures are read where they lie."""
    place = Place(task.place)
    with place.local([_part("hashes", split) for split in splits]) as files:
        hashes = [_rows(file, "<u8", 2) for file in files]
        # Of near duplicates, equal texts are the nearest.
        found = exact_duplicates(hashes)
        if not task.cleaning.duplicates:
            found = [np.full_like(each, KEPT) for each in found]
    if task.cleaning.near_duplicates is not None:
        with place.local([_part("signatures", split) for split in splits]) as files:
            signatures = [_rows(file, "<u4", PERMUTATIONS) for file in files]
            found = near_duplicates(signatures, found, task.cleaning.near_duplicates)
    for split, codes in zip(splits, found, strict=True):
        place.write(_part("duplicates", split), codes.tobytes())


def _rows(file: Path, dtype: str, width: int) -> np.ndarray:
    if not file.stat().st_size:
        return np.zeros((0, width), dtype)
    return np.memmap(file, dtype, "r").reshape(-1, width)


def _judged(task: Task, split: Split, documents: Iterator[Document]) -> Iterator[tuple[Document, str | None]]:
    """Documents, and why they are left out."""
    if not task.cleaning.compares:
        judge = tools_of(task).judge
        yield from ((document, judge.reason(document)) for document in documents)
        return
    place = Place(task.place)
    looked = json.loads(place.read(_part("judged", split)) or b"{}")
    names = [None, *looked["reasons"]]
    duplicates = iter(place.read(_part("duplicates", split)) or b"")
    for document, number in zip(documents, looked["judged"], strict=True):
        yield document, names[number] if number else REASONS.get(next(duplicates))


def written(task: Task, split: Split) -> bool:
    """Whether a split's shard is there, as it was written."""
    place = Place(task.place)
    receipt = _read_receipt(task, split)
    if receipt is None or receipt.shard is None:
        return receipt is not None
    return place.size(shard_name(split.index)) == receipt.shard.bytes


def write(task: Task, split: Split) -> None:
    """Tokenises what stays of a split into its shard."""
    place, tools = Place(task.place), tools_of(task)
    skipped, statistics = SkipCounts(), Statistics()

    def staying() -> Iterator[Document]:
        documents = read_split(task.corpus, split, skipped)
        for document, reason in _judged(task, split, documents):
            if reason is None:
                yield document
            else:
                skipped[reason] += 1
                statistics.leave_out(reason, document.text)

    batches = encoded(tools.rendered(staying(), skipped, statistics), tools.encoder)
    if tools.encoder is None:
        receipt = write_shard(None, batches, skipped, statistics)
    else:
        with place.written(shard_name(split.index)) as path:
            receipt = write_shard(path, batches, skipped, statistics)
    place.write(_part("written", split), json_bytes({"source": task.source, **dataclasses.asdict(receipt)}))


def _read_receipt(task: Task, split: Split) -> Written | None:
    """None: there is none, or it is another task's."""
    read = json.loads(Place(task.place).read(_part("written", split)) or b"{}")
    if read.pop("source", "") != task.source:
        return None
    shard = None if read["shard"] is None else Shard(**read.pop("shard"))
    return Written(**(read | {"shard": shard}))


def finish(task: Task, splits: Sequence[Split]) -> Manifest:
    """Counts the shards together, and says what is there.

    Raises:
      UserError: no document stayed, or another task was at work here too.
    """
    place, tools = Place(task.place), tools_of(task)
    parts = [receipt for split in splits if (receipt := _read_receipt(task, split)) is not None]
    if len(parts) < len(splits):
        raise UserError(
            f"something else was prepared in {task.place} at the same time: let it end, and run the same command again"
        )
    if not sum(part.counts["records" if tools.encoder is None else "trained_tokens"] for part in parts):
        skipped = SkipCounts()
        for part in parts:
            skipped.update(part.skipped)
        raise nothing_usable(task.corpus, skipped)
    tokenizer = "" if tools.encoder is None else tools.encoder.fingerprint
    manifest = write_manifest(place, task.corpus.name, task.corpus.format, tokenizer, parts, task.source)
    place.remove(WORK)
    return manifest
