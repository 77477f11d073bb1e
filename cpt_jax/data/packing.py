"""Documents into rows: each keeps its own segment and its own positions, and predicts only its own next tokens."""

from typing import Any

import grain
import numpy as np

# Rows that are open at a time: first fit among that many leaves about 2% of a row of 256 empty with documents of
# some 80 tokens.
OPEN_ROWS = 64


class SplitDocuments(grain.experimental.FlatMapTransform):
    """Token ids of a document -> pieces of at most `sequence_length` predictions.

    A document is framed by the start and the end token: inputs [start, t1 .. tn] predict targets [t1 .. tn, end]. A
    longer one continues in the next piece with the token that the piece before predicted last, so that every token
    is predicted exactly once.
    """

    def __init__(self, sequence_length: int, start_id: int, end_id: int, domain: int) -> None:
        self.sequence_length, self.start_id, self.end_id, self.domain = sequence_length, start_id, end_id, domain

    def flat_map(self, tokens: np.ndarray) -> list[dict[str, np.ndarray]]:
        framed = np.concatenate([[self.start_id], tokens, [self.end_id]]).astype(np.int32)
        pieces = []
        for first in range(0, len(framed) - 1, self.sequence_length):
            piece = framed[first : first + self.sequence_length + 1]
            length = len(piece) - 1
            pieces.append(
                {
                    "inputs": piece[:-1],
                    "targets": piece[1:],
                    "weights": np.ones(length, np.float32),
                    "domains": np.full(length, self.domain, np.int32),
                }
            )
        return pieces


def packed(pieces: Any, sequence_length: int, seed: int) -> grain.IterDataset:
    """Rows [sequence_length] of whole pieces, first fit, as dicts with inputs, targets, positions, segment_ids,
    domains and weights."""
    fields = ("inputs", "targets", "weights", "domains")
    rows = grain.experimental.FirstFitPackIterDataset(
        pieces,
        length_struct={field: sequence_length for field in fields},
        num_packing_bins=OPEN_ROWS,
        seed=seed,
        shuffle_bins=True,
    )
    return rows.map(_row)


def _row(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    kept = {field: row[field] for field in ("inputs", "targets", "weights", "domains")}
    return kept | {"positions": row["inputs_positions"], "segment_ids": row["inputs_segment_ids"]}
