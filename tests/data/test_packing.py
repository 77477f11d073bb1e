"""How pieces come into rows."""

import itertools
from collections import Counter

import numpy as np

from cpt_jax.data.packing import OPEN_ROWS, gather, placed


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
