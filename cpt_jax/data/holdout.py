"""Documents that neither the tokenizer nor training ever sees, chosen by hash: the same ones whatever else is in the
corpus."""

import dataclasses
import hashlib
import heapq
import json
from collections.abc import Iterator
from pathlib import Path

from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import write_text_atomic
from cpt_jax.data.conversations import plain_text
from cpt_jax.data.sources import HELD_OUT, Corpus, Document, SkipCounts, read


def _unit_hash(text: str) -> float:
    """SHA-256 as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64


def text_hash(text: str) -> bytes:
    """What tells two texts apart, in 16 bytes, whatever their white space."""
    return hashlib.sha256(" ".join(text.split()).encode()).digest()[:16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holdout:
    """The share of keys held out, and how much of their text is used to evaluate (bytes, and per document)."""

    share: float = 0.1
    max_bytes: int = 20_000
    max_document_bytes: int = 4_000

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(
                f"holdout share is {self.share}: give a share above 0, at most 1 (1: the domain is only measured)"
            )
        if self.max_bytes < 1 or self.max_document_bytes < 1:
            raise UserError(
                f"holdout max_bytes and max_document_bytes are {self.max_bytes} and {self.max_document_bytes}: give at least 1"
            )

    def holds_out(self, document: Document) -> bool:
        return _unit_hash(document.key) < self.share


def write_heldout(corpus: Corpus, holdout: Holdout, directory: Path) -> None:
    """Writes heldout.jsonl, the documents to evaluate on, in the order of their hashes, up to `max_bytes`; and
    heldout_hashes.bin, 16 bytes for each held-out text, by which equal texts elsewhere in the corpus are kept out of
    training.

    Raises:
      UserError: the hash held out none (the corpus is too small), or the corpus is one document.
    """
    hashes: set[bytes] = set()
    # The first max_bytes by hash, without keeping the rest: a heap with the largest hash on top.
    chosen: list[tuple[float, str, Document]] = []
    size, shortest = 0, None
    # Of what is only measured, all may be one document.
    first, several, count = None, holdout.share == 1, 0
    for document in read(corpus, SkipCounts()):
        count += 1
        first = document.key if first is None else first
        several = several or document.key != first
        if not holdout.holds_out(document):
            continue
        digest = text_hash(document.text)
        length = len(document.text.encode())
        shortest = length if shortest is None else min(shortest, length)
        if digest in hashes or length > holdout.max_document_bytes:
            hashes.add(digest)
            continue
        hashes.add(digest)
        heapq.heappush(chosen, (-_unit_hash(document.text), document.text, document))
        size += length
        while size > holdout.max_bytes and len(chosen) > 1:
            size -= len(heapq.heappop(chosen)[1].encode())
    if not several:
        raise _one_document(corpus, count)
    if not chosen:
        raise _nothing_held_out(corpus, holdout, shortest)
    records = [
        {"messages": document.messages} if document.messages else {"text": text}
        for _, text, document in sorted(chosen, reverse=True)
    ]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "heldout_hashes.bin").write_bytes(b"".join(sorted(hashes)))
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_text_atomic(directory / "heldout.jsonl", "".join(lines))


def _one_document(corpus: Corpus, count: int) -> UserError:
    if corpus.group_field is not None:
        what, cut = f"all its documents have the same {corpus.group_field!r}", "give another group_field, or none"
    elif count > 1:
        what, cut = f"its {count:,} documents are one text", "give others"
    else:
        what, cut = "it is one document", "cut it into several (in .txt, empty lines part them)"
    return UserError(
        f"corpus {corpus.name}: {what}, which is held out or learnt from, not both: {cut}; where it is only measured, hold out "
        "all of it (heldout.share 1 of the domain; --heldout-share 1 of a tokenizer)"
    )


def _nothing_held_out(corpus: Corpus, holdout: Holdout, shortest: int | None) -> UserError:
    """`shortest`: the bytes of the shortest document that the hash held out; None where it held out none."""
    if shortest is None:
        return UserError(
            f"corpus {corpus.name}: no document fell into the held-out share of {holdout.share:g}: give more documents, or raise "
            "the share (heldout.share of the domain, as in --domains.0.heldout.share 0.5; --heldout-share of a tokenizer)"
        )
    return UserError(
        f"corpus {corpus.name}: of the documents that were held out, the shortest has {shortest:,} bytes, and what is measured has "
        f"at most {holdout.max_document_bytes:,}: cut documents, or raise heldout.max_document_bytes of the domain, as in "
        f"--domains.0.heldout.max_document_bytes {2 * shortest}"
    )


def heldout_documents(directory: Path) -> list[Document]:
    """The documents to evaluate on."""
    documents = []
    for line in (directory / "heldout.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        record = json.loads(line)
        messages = tuple(record.get("messages", ()))
        text = plain_text(messages) if messages else record["text"]
        documents.append(Document(text, text, messages))
    return documents


def read_heldout(directory: Path) -> list[str]:
    """The texts to evaluate on."""
    return [document.text for document in heldout_documents(directory)]


def training_documents(corpus: Corpus, holdout: Holdout, directory: Path, skipped: SkipCounts) -> Iterator[str]:
    """The texts of `learnable_documents`."""
    for document in learnable_documents(corpus, holdout, directory, skipped):
        yield document.text


def learnable_documents(corpus: Corpus, holdout: Holdout, directory: Path, skipped: SkipCounts) -> Iterator[Document]:
    """The documents that may be learnt from: not held out, nor equal to one that is."""
    hashes = heldout_hashes(directory)
    for document in read(corpus, skipped):
        if (reason := heldout_reason(document, holdout, hashes)) is not None:
            skipped[reason] += 1
        else:
            yield document


def heldout_hashes(directory: Path) -> set[bytes]:
    """`text_hash` of every held-out text."""
    packed = (directory / "heldout_hashes.bin").read_bytes()
    return {packed[i : i + 16] for i in range(0, len(packed), 16)}


def heldout_reason(document: Document, holdout: Holdout, hashes: set[bytes]) -> str | None:
    """Why a document may not be learnt from, where it is held out or equal to one that is."""
    if holdout.holds_out(document):
        return HELD_OUT
    return "equal to a held-out text" if text_hash(document.text) in hashes else None


class HeldApart:
    """A corpus in two parts, by hash: what may be learnt from, and what is only measured; `place` holds which is
    which."""

    def __init__(self, corpus: Corpus, holdout: Holdout, place: Path) -> None:
        self._corpus, self._holdout, self._directory = corpus, holdout, place / corpus.name
        write_heldout(corpus, holdout, self._directory)

    def measured(self) -> list[str]:
        return read_heldout(self._directory)

    def learnt(self) -> Iterator[str]:
        return training_documents(self._corpus, self._holdout, self._directory, SkipCounts())
