"""How pieces come into rows."""

import itertools
from collections import Counter

import numpy as np

from cpt_jax.data.packing import OPEN_ROWS, gather, in_order, placed


class Documents:
    """A reader of documents of these lengths, again and again, cut where they have no room."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths, self._left = itertools.cycle(enumerate(lengths)), (0, 0)

    def begin(self) -> None:
        pass

    def take(self, most: int) -> tuple[int, int]:
        if not self._left[1]:
            self._left = next(self._lengths)
        place, length = self._left
        given = min(length, most)
        self._left = (place, length - given)
        return place, given


def test_concatenated_rows_are_full_or_hold_as_many_documents_as_they_may():
    sequence_length, most = 10, 3
    pieces = gather(
        [Documents([2, 1, 2, 9, 1])],  # type: ignore[list-item]
        [0.0],
        np.ones((OPEN_ROWS, 1)),
        sequence_length,
        "concatenate",
        most,
    )
    rows = placed(pieces.lengths, sequence_length, "concatenate", most)
    tokens, documents = Counter(), Counter(rows)
    for row, length in zip(rows, pieces.lengths, strict=True):
        tokens[row] += length
    assert len(documents) == OPEN_ROWS
    assert all(tokens[row] == sequence_length or documents[row] == most for row in documents)
    assert max(documents.values()) == most
    assert max(tokens.values()) == sequence_length


class Few(Documents):
    """A reader of so many documents of four tokens."""

    def __init__(self, count: int) -> None:
        super().__init__([4])
        self._count = count

    def take(self, most: int) -> tuple[int, int] | None:
        self._count -= 1
        return None if self._count < 0 else super().take(most)


def test_a_domain_without_a_share_is_taken_when_no_other_has_text_left():
    shares = np.tile([1.0, 0.0], (OPEN_ROWS, 1))
    pieces = gather([Few(5), Few(3)], [0.0, 0.0], shares, 8, "best fit", 4)  # type: ignore[list-item]
    assert pieces.domains == [0] * 5 + [1] * 3


def test_long_pieces_are_placed_first():
    assert placed([3, 3, 7, 7], 10, "best fit", 4) == [0, 1, 0, 1]


def test_rows_follow_the_shares_as_they_change():
    tokens = np.repeat(np.eye(2), 8, axis=0)
    shares = np.array([[0.5, 0.5]] * 8 + [[0.0, 1.0]] * 4 + [[1.0, 0.0]] * 4)
    order = in_order(tokens, shares, np.zeros(2), np.random.default_rng(0))
    assert sorted(order) == list(range(16))
    read = np.cumsum(tokens[order], 0)
    assert np.abs(read - np.cumsum(shares, 0)).max() <= 0.5
