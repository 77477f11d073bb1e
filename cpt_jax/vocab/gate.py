"""The gate that an extended tokenizer must pass: nothing was taken from the base, and the new pieces are used."""

import collections
import dataclasses
import random
from collections.abc import Iterable, Sequence

from cpt_jax.core.errors import UserError
from cpt_jax.vocab.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Beyond these the extension is refused: shares between 0 and 1."""

    old_documents_changed: float = 0.05
    unreachable_pieces: float = 0.25

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not 0 <= (value := getattr(self, field.name)) <= 1:
                raise UserError(f"limit {field.name} is {value}: give a share between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PieceUse:
    """How the new pieces occur in the text they were learnt from."""

    new_pieces: int
    unreachable_pieces: int
    most_frequent: list[tuple[str, int]]
    longest: list[str]


def piece_use(base: Tokenizer, extended: Tokenizer, texts: Iterable[str], shown: int = 30) -> PieceUse:
    """Counts the new pieces in `texts`. One that never occurs is a step on the way to longer pieces, or was
    overtaken by one."""
    counts: collections.Counter[int] = collections.Counter()
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == 1024:
            counts.update(index for ids in extended.encode_documents(batch) for index in ids if index >= base.size)
            batch = []
    counts.update(index for ids in extended.encode_documents(batch) for index in ids if index >= base.size)
    new = range(base.size, extended.size)
    pieces = {index: extended.piece(index) for index in new if counts[index]}
    return PieceUse(
        new_pieces=len(new),
        unreachable_pieces=sum(1 for index in new if not counts[index]),
        most_frequent=[(pieces[index], count) for index, count in counts.most_common(shown)],
        longest=sorted(pieces.values(), key=lambda piece: (-len(piece), piece))[:shown],
    )


def fuzzed_texts(count: int, seed: int = 0) -> list[str]:
    """Arbitrary Unicode: any code points but surrogates, in runs of scripts, with controls, joiners and combining
    marks between them."""
    generator = random.Random(seed)
    ranges = [
        (0x20, 0x7E),
        (0x00, 0x1F),
        (0xA0, 0x2AF),
        (0x300, 0x36F),
        (0x600, 0x6FF),
        (0x900, 0x97F),
        (0x200B, 0x200F),
    ]
    ranges += [
        (0x3040, 0x30FF),
        (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A3),
        (0x1F300, 0x1FAFF),
        (0xE000, 0xE0FF),
        (0x10000, 0x10FFFF),
    ]
    texts = []
    for _ in range(count):
        runs = []
        for _ in range(generator.randint(1, 8)):
            first, last = generator.choice(ranges)
            runs.append("".join(chr(generator.randint(first, last)) for _ in range(generator.randint(1, 12))))
        texts.append("".join(runs))
    return texts


def check(
    base: Tokenizer, extended: Tokenizer, corpora: Sequence[dict], old: Sequence[str], use: PieceUse, limits: Limits
) -> None:
    """Refuses an extended tokenizer.

    Args:
      corpora: `fertility.compare` of held-out text, by corpus.
      old: names of the corpora whose text is to stay as it was.

    Raises:
      UserError: an id changed, a text does not come back, too much old text is tokenised differently, or too many
      pieces are never used.
    """
    kept, now = base.backend.get_vocab(with_added_tokens=True), extended.backend.get_vocab(with_added_tokens=True)
    if moved := [piece for piece, index in kept.items() if now.get(piece) != index]:
        raise UserError(
            f"the extended tokenizer changed {len(moved)} ids of the base, {moved[0]!r} first: extend the base anew"
        )
    fuzz = fuzzed_texts(1000)
    for text, before, after in zip(fuzz, base.encode_documents(fuzz), extended.encode_documents(fuzz), strict=True):
        if base.decode(before) == text and extended.decode(after) != text:
            raise UserError(
                f"the extended tokenizer does not give back {text!r}, which the base does: extend the base anew"
            )
    for corpus in corpora:
        if corpus["round_trip_failures"]:
            raise UserError(
                f"{corpus['round_trip_failures']} documents of {corpus['name']} do not come back from the extended tokenizer"
            )
        if corpus["name"] in old and corpus["documents_changed"] > limits.old_documents_changed:
            raise UserError(
                f"{corpus['documents_changed']:.1%} of the old documents ({corpus['name']}) are tokenised differently, more than the limit of "
                f"{limits.old_documents_changed:.1%}: lower the number of new pieces, or raise vocabulary.limits.old_documents_changed"
            )
    share = use.unreachable_pieces / use.new_pieces
    if share > limits.unreachable_pieces:
        raise UserError(
            f"{share:.1%} of the new pieces are never used in the text they were learnt from, more than the limit of "
            f"{limits.unreachable_pieces:.1%}: lower the number of new pieces, or raise vocabulary.limits.unreachable_pieces"
        )
