"""Growing a byte-level BPE tokenizer: new pieces with merges that make them, behind the base's; no id changes its
meaning."""

import collections
import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers

from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import atomic_directory, write_text_atomic
from cpt_jax.vocab.merges import PairCounts
from cpt_jax.vocab.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuedBPE:
    """Merge learning goes on from the base's own segmentation of the new text (Purason et al. 2025, arXiv 2512.03989).

    A merge is refused where it would change how the old text is tokenised (a pair that stands side by side in it),
    and where its piece would be longer than `max_piece_characters` or rarer than `min_frequency`.
    """

    new_tokens: int
    max_piece_characters: int = 16
    min_frequency: int = 2

    def __post_init__(self) -> None:
        _check_new_tokens(self.new_tokens)

    def merges(self, base: Tokenizer, texts: Iterable[str], protected: Iterable[str]) -> Iterator[tuple[str, str]]:
        """The new merges, most frequent first."""
        words = word_counts(base, texts)
        model = base.backend.model
        segments = [[token.id for token in model.tokenize(word)] for word in words]
        pairs = PairCounts(segments, list(words.values()))
        untouchable = adjacent_pairs(base, protected)
        pieces: dict[int, str] = {index: piece for piece, index in base.document["model"]["vocab"].items()}
        known = set(pieces.values())
        next_id = max(base.size, max(pieces) + 1)

        def allowed(pair: tuple[int, int]) -> bool:
            piece = pieces[pair[0]] + pieces[pair[1]]
            return (
                pair not in untouchable and piece not in known and byte_characters(piece) <= self.max_piece_characters
            )

        for _ in range(self.new_tokens):
            found = pairs.most_frequent(allowed)
            if found is None or found[1] < self.min_frequency:
                return
            (left, right), _count = found
            yield pieces[left], pieces[right]
            pieces[next_id] = pieces[left] + pieces[right]
            known.add(pieces[next_id])
            pairs.merge((left, right), next_id)
            next_id += 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Union:
    """The pieces of a BPE trained on the new text alone, in its order, as far as their parts are there."""

    new_tokens: int

    def __post_init__(self) -> None:
        _check_new_tokens(self.new_tokens)

    def merges(self, base: Tokenizer, texts: Iterable[str], protected: Iterable[str]) -> Iterator[tuple[str, str]]:
        """The new merges, in the order in which the domain's own tokenizer learnt them."""
        domain = tokenizers.Tokenizer(tokenizers.models.BPE())
        domain.pre_tokenizer = base.backend.pre_tokenizer  # type: ignore[assignment]
        if base.backend.normalizer is not None:
            domain.normalizer = base.backend.normalizer  # type: ignore[assignment]
        trainer = tokenizers.trainers.BpeTrainer(  # type: ignore[call-arg]
            vocab_size=256 + 4 * self.new_tokens,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        domain.train_from_iterator(texts, trainer)
        ids = base.document["model"]["vocab"]
        known = set(ids)
        untouchable = adjacent_pairs(base, protected)
        count = 0
        for left, right in json.loads(domain.to_str())["model"]["merges"]:
            if count == self.new_tokens:
                return
            touches = (ids.get(left, -1), ids.get(right, -1)) in untouchable
            if left in known and right in known and left + right not in known and not touches:
                known.add(left + right)
                count += 1
                yield left, right


Extension = ContinuedBPE | Union


def _check_new_tokens(count: int) -> None:
    if count < 1:
        raise UserError(f"new_tokens is {count}: give at least 1, or leave the vocabulary as it is")


def byte_characters(piece: str) -> int:
    """Characters that begin in a byte-level piece (each byte is written as one character)."""
    alphabet = _byte_of()
    return sum(1 for character in piece if alphabet[character] & 0xC0 != 0x80)


def _byte_of() -> dict[str, int]:
    """The byte that a character of a byte-level piece stands for (GPT-2's table)."""
    if not _BYTES:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        _BYTES.update({chr(byte): byte for byte in printable})
        _BYTES.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return _BYTES


_BYTES: dict[str, int] = {}


def word_counts(base: Tokenizer, texts: Iterable[str]) -> dict[str, int]:
    """How often each pre-token of the base's pre-tokenizer occurs: merges never reach across these."""
    split, normalizer = base.backend.pre_tokenizer, base.backend.normalizer
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        counts.update(word for word, _ in split.pre_tokenize_str(text))
    return dict(counts)


def adjacent_pairs(base: Tokenizer, texts: Iterable[str]) -> set[tuple[int, int]]:
    """Pairs of the base's tokens that stand side by side in a word of the texts: merging one of them would change
    these texts."""
    model = base.backend.model
    pairs: set[tuple[int, int]] = set()
    for word in word_counts(base, texts):
        ids = [token.id for token in model.tokenize(word)]
        pairs.update(itertools.pairwise(ids))
    return pairs


def check_extendable(base: Tokenizer) -> None:
    """Raises UserError unless this is a byte-level BPE tokenizer."""
    model = base.document["model"]
    steps = base.document["pre_tokenizer"] or {}
    kinds = {steps.get("type"), *(step["type"] for step in steps.get("pretokenizers", []))}
    if model["type"] != "BPE" or "ByteLevel" not in kinds or model.get("byte_fallback"):
        raise UserError(
            f"{base.directory}: the tokenizer is of kind {model['type']}"
            + (" with byte fallback" if model.get("byte_fallback") else "")
            + ": only byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) can be extended so far; keep its vocabulary (new pieces 0)"
        )


def extend(
    base_directory: Path, extension: Extension, texts: Iterable[str], protected: Iterable[str], out: Path
) -> int:
    """Writes the extended tokenizer into `out` with the base's other tokenizer files, and returns the number of new
    pieces.

    Ids of the base stay; added and special tokens stay; new ids begin behind all of them; new merges come behind the
    base's.

    Args:
      texts: what to learn pieces from.
      protected: text of the old domain, which is tokenised afterwards as before.

    Raises:
      UserError: a tokenizer of another kind, or a text in which nothing is worth adding.
    """
    base = Tokenizer(base_directory)
    check_extendable(base)
    document = json.loads(json.dumps(base.document))
    vocabulary, merges = document["model"]["vocab"], document["model"]["merges"]
    as_text = bool(merges) and isinstance(merges[0], str)
    next_id = base.size
    for left, right in extension.merges(base, texts, protected):
        vocabulary[left + right] = next_id
        merges.append(f"{left} {right}" if as_text else [left, right])
        next_id += 1
    if next_id == base.size:
        raise UserError("nothing in the corpus is worth adding to the vocabulary: set the number of new pieces to 0")
    with atomic_directory(Path(out)) as directory:
        for path in Path(base_directory).iterdir():
            if path.suffix in (".json", ".jinja", ".txt") and path.name.startswith(
                ("tokenizer", "special_tokens", "added_tokens", "chat_")
            ):
                shutil.copyfile(path, directory / path.name)
        write_text_atomic(directory / "tokenizer.json", json.dumps(document, ensure_ascii=False))
    return next_id - base.size


def old_segmentation(base: Tokenizer, extended: Tokenizer) -> list[list[int]]:
    """For each new id in order, the base's ids that its merges put together.

    They are walked down the merge tree: a piece may begin or end inside a character, so its text cannot simply be
    encoded.
    """
    vocabulary = extended.document["model"]["vocab"]
    parts: dict[str, tuple[str, str]] = {}
    for merge in extended.document["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        parts.setdefault(left + right, (left, right))
    known: dict[str, list[int]] = {}

    def walk(piece: str) -> list[int]:
        if piece not in known:
            index = vocabulary[piece]
            known[piece] = [index] if index < base.size else walk(parts[piece][0]) + walk(parts[piece][1])
        return known[piece]

    by_id = {index: piece for piece, index in vocabulary.items()}
    return [walk(by_id[index]) for index in range(base.size, extended.size)]
