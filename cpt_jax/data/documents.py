"""A prepared domain's documents in the order they are trained on, cut into pieces."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Literal

import grain
import numpy as np

from cpt_jax.core.errors import UserError
from cpt_jax.data.prepare import NOT_LEARNT
from cpt_jax.data.records import Records
from cpt_jax.data.tfds_format import array_of

# What becomes of documents longer than a row: they go on in another one, or their rest is left out, or all of them.
LongDocuments = Literal["split", "cut", "leave out"]

# Documents are read so many tokens at a time, at most 256 documents: a record read alone costs 170 microseconds, in a
# block 6.
BLOCK_TOKENS = 65_536
BLOCK_DOCUMENTS = 256
# grain shuffles without holding an order: an index then costs 10 microseconds of many documents, but 70 of 256 and
# 4,000 of four.
FEW = 256
_NOTHING = np.zeros(0, np.uint32)


@dataclasses.dataclass(frozen=True)
class Block:
    """Some documents behind one another.

    Args:
      tokens: int32 [n], each document framed; token i + 1 is predicted from token i.
      learnt: bool [n], whether a token is to be learnt.
      begins: the first token of each document.
      predictions: how many each has: of its tokens but the first.
      whole: whether all of it is to be learnt.
    """

    tokens: np.ndarray
    learnt: np.ndarray
    begins: list[int]
    predictions: list[int]
    whole: bool


class Documents:
    """The domain's documents without end, shuffled anew every epoch without being held in memory.

    Any of them can be found by its number: a position is [number of the document, predictions of it that were taken].
    A document is framed by the start and the end token: [start, t1 .. tn] predict [t1 .. tn, end]. The end is not to be
    learnt where tn is not: a text was cut there. Without a `frame` (a chat template has its own) [t1 .. tn-1] predict
    [t2 .. tn].
    """

    def __init__(
        self,
        records: Records,
        *,
        seed: int,
        frame: tuple[int, int] | None,
        sequence_length: int,
        mean_tokens: float,
        long_documents: LongDocuments = "split",
    ) -> None:
        self.records, self._frame = records, frame
        self._length, self._long = sequence_length, long_documents
        self.size = max(1, min(BLOCK_DOCUMENTS, int(BLOCK_TOKENS / max(mean_tokens, 1))))
        self._blocks = _shuffled(len(records), seed).batch(self.size).map(self._read)

    def block(self, number: int) -> Block:
        """Documents number * size and following."""
        block = self._blocks[number]
        assert block is not None
        return block

    def _read(self, numbers: np.ndarray) -> Block:
        read = self.records.read(numbers.tolist())
        start, end = (np.array([token], np.uint32) for token in self._frame) if self._frame else (_NOTHING, _NOTHING)
        framed = [(_NOTHING,) if record is None else (start, array_of(record), end) for record in read]
        stored = np.concatenate([part for parts in framed for part in parts])
        lengths = np.array([sum(map(len, parts)) for parts in framed], np.int64)
        begins = np.cumsum(lengths) - lengths
        if self._frame:
            ends = (begins + lengths)[lengths > 0] - 1
            stored[ends] |= stored[ends - 1] & np.uint32(NOT_LEARNT)
        learnt = stored < NOT_LEARNT
        tokens = (stored & np.uint32(NOT_LEARNT - 1)).view(np.int32)
        predictions = np.maximum(lengths - 1, 0)
        if self._long != "split":
            rest = self._length if self._long == "cut" else 0
            predictions = np.where(predictions > self._length, rest, predictions)
        return Block(tokens, learnt, begins.tolist(), predictions.tolist(), bool(learnt.all()))


def _shuffled(count: int, seed: int) -> grain.MapDataset:
    """The numbers of documents, in another order every epoch."""
    if 0 < count < FEW:
        return grain.MapDataset.source(_OfFew(count, seed))
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat()


class _OfFew:
    """The order of few documents, of which a whole epoch is made at once."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(index, self._count)
        return _order(self._count, self._seed, epoch)[place]


@functools.lru_cache(maxsize=64)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


@dataclasses.dataclass(frozen=True)
class Taken:
    """What a reader took since it was told to begin: tokens and learnt as in Block; the pieces' places are in them."""

    tokens: np.ndarray
    learnt: np.ndarray


class Reader:
    """Takes pieces of a domain's documents, one after the other, from a position on."""

    def __init__(self, documents: Documents, position: Sequence[int] = (0, 0)) -> None:
        self._documents = documents
        self._end: int | None = None
        # The number of the block at hand, and that of the one that is read.
        self._at, self._read_at = 0, -1
        self._block: Block | None = None
        # Documents passed since the last block that a piece came from.
        self._fruitless = 0
        self.go(position)

    def go(self, position: Sequence[int]) -> None:
        """Continues at a position."""
        number, self._offset = position
        self._at, self._index = divmod(number, self._documents.size)
        self.begin()

    def end_after(self, epochs: int | None) -> None:
        """No document is begun that another epoch would begin with; None: there is no end."""
        self._end = None if epochs is None else epochs * len(self._documents.records)

    def _at_hand(self) -> Block:
        if self._block is None or self._read_at != self._at:
            self._block, self._read_at = self._documents.block(self._at), self._at
        return self._block

    def _number(self) -> int:
        return self._at * self._documents.size + self._index

    def position(self) -> list[int]:
        return [self._number(), self._offset]

    def begin(self) -> None:
        """Forgets what was taken."""
        self._kept: list[tuple[Block, int]] = []
        self._base, self._low = 0, None

    def take(self, most: int) -> tuple[int, int] | None:
        """The next piece, of at most so many predictions: (place of its first token in what was taken, predictions).
        None: there are no more. Pieces in which nothing is to be learnt are left out.
        """
        while self._end is None or self._offset or self._number() < self._end:
            block = self._at_hand()
            if self._index >= len(block.predictions):
                self._next_block(block)
                continue
            left = block.predictions[self._index] - self._offset
            if left <= 0:
                self._index, self._offset = self._index + 1, 0
                continue
            first, length = block.begins[self._index] + self._offset, min(left, most)
            if length == left:
                self._index, self._offset = self._index + 1, 0
            else:
                self._offset += length
            if block.whole or block.learnt[first + 1 : first + 1 + length].any():
                if self._low is None:
                    self._low = first
                # This block counts for nothing at its end.
                self._fruitless = -len(block.predictions)
                return self._base + first - self._low, length
        return None

    def _next_block(self, block: Block) -> None:
        if self._low is not None:
            self._kept.append((block, self._low))
            self._base += len(block.tokens) - self._low
            # What is taken of the next one is counted from its begin.
            self._low = 0
        self._at, self._index = self._at + 1, 0
        self._fruitless += len(block.predictions)
        if self._fruitless > 2 * len(self._documents.records):
            raise UserError(
                f"{self._documents.records}: none of {len(self._documents.records):,} documents can be used: they cannot "
                "be read, or are longer than a row and left out"
            )

    def taken(self) -> Taken:
        parts = [(block, low, len(block.tokens)) for block, low in self._kept]
        if self._low is not None:
            block = self._at_hand()
            # One token behind the position: a piece that goes on ends with it.
            index, begins = self._index, block.begins
            end = begins[index] + self._offset + 1 if index < len(begins) else len(block.tokens)
            parts.append((block, self._low, end))
        if not parts:
            return Taken(np.zeros(0, np.int32), np.zeros(0, bool))
        tokens = np.concatenate([block.tokens[low:high] for block, low, high in parts])
        return Taken(tokens, np.concatenate([block.learnt[low:high] for block, low, high in parts]))
