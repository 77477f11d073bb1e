"""Documents into rows: each keeps its own segment and its own positions, and predicts only its own next tokens."""

import math
from typing import Any, Literal

import grain
import numpy as np

# How pieces come into rows: several in one, or each alone.
Packing = Literal["first fit", "none"]

# Rows that are open at a time: first fit among that many leaves about 2% of a row of 256 empty with documents of
# some 80 tokens.
OPEN_ROWS = 64


class SplitDocuments(grain.experimental.FlatMapTransform):
    """Token ids [n] of a document, and which of them are to be learnt [n] -> pieces of at most `sequence_length`
    predictions, each with the weight of its target.

    A document is framed by the start and the end token: inputs [start, t1 .. tn] predict targets [t1 .. tn, end]. A
    longer one continues in the next piece with the token that the piece before predicted last, so that every token
    is predicted exactly once. Without a `frame` (a chat template has its own) inputs [t1 .. tn-1] predict targets
    [t2 .. tn]. Pieces in which nothing is to be learnt are left out.
    """

    def __init__(self, sequence_length: int, frame: tuple[int, int] | None, domain: int) -> None:
        self.sequence_length, self.frame, self.domain = sequence_length, frame, domain

    def flat_map(self, document: tuple[np.ndarray, np.ndarray]) -> list[dict[str, np.ndarray]]:
        framed, learnt = document
        if self.frame is None:
            learnt = learnt[1:]
        else:
            start_id, end_id = self.frame
            framed = np.concatenate([[start_id], framed, [end_id]]).astype(np.int32)
            learnt = np.concatenate([learnt, [True]])
        weights, pieces = learnt.astype(np.float32), []
        for first in range(0, len(weights), self.sequence_length):
            piece = framed[first : first + self.sequence_length + 1]
            length = len(piece) - 1
            if not weights[first : first + length].any():
                continue
            pieces.append(
                {
                    "inputs": piece[:-1],
                    "targets": piece[1:],
                    "weights": weights[first : first + length],
                    "domains": np.full(length, self.domain, np.int32),
                }
            )
        return pieces


def documents_in_a_row(sequence_length: int, documents_a_token: float) -> int:
    """How many may be packed into one, the padding behind them counted: a power of two, at least 16 and twice as many
    as a usual row has."""
    usual = max(sequence_length * documents_a_token, 1)
    return max(2 ** math.ceil(math.log2(2 * usual)), 16)


def packed(pieces: Any, sequence_length: int, documents: int, seed: int) -> grain.IterDataset:
    """Rows [sequence_length] of whole pieces, fewer than `documents`, first fit, as dicts with inputs, targets, positions,
    segment_ids, domains and weights."""
    fields = ("inputs", "targets", "weights", "domains")
    rows = grain.experimental.FirstFitPackIterDataset(
        pieces,
        length_struct={field: sequence_length for field in fields},
        num_packing_bins=OPEN_ROWS,
        seed=seed,
        shuffle_bins=True,
        max_sequences_per_bin=max(documents - 1, 1),
    )
    return rows.map(_row)


def one_by_one(pieces: grain.IterDataset, sequence_length: int) -> grain.IterDataset:
    """Rows as `packed` makes them, each with one piece."""

    def row(piece: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        length = len(piece["inputs"])
        fields = piece | {"positions": np.arange(length, dtype=np.int32), "segment_ids": np.ones(length, np.int32)}
        return {field: np.pad(values, (0, sequence_length - length)) for field, values in fields.items()}

    return pieces.map(row)


def _row(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    kept = {field: row[field] for field in ("inputs", "targets", "weights", "domains")}
    return kept | {"positions": row["inputs_positions"], "segment_ids": row["inputs_segment_ids"]}
