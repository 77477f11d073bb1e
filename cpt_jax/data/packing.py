"""Pieces of documents into rows: each keeps its own segment and its own positions, and predicts only its own next
tokens."""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from cpt_jax.data.documents import Reader, Taken

# How pieces come into rows: each where it leaves the least room; or one behind the other, cut where a row is full; or
# each alone.
Packing = Literal["best fit", "concatenate", "none"]

# Rows that are packed at a time. Documents of some 80 tokens leave 1% of 64 rows of 256 empty, those of a few hundred
# or thousand (log-normal) 1 to 2.5%.
OPEN_ROWS = 64
# Pieces of at least a row's eighth are placed first, longest first; the others as they come, so that no row is made of
# the shortest alone: sorting all of them left 7% of rows of 2048 empty, which may not have that many documents.
LARGE = 8

Rows = dict[str, np.ndarray]


@dataclasses.dataclass
class Pieces:
    """What is packed together: each piece's domain, the place of its first token in what the domain's reader took, and
    how many tokens it predicts."""

    domains: list[int] = dataclasses.field(default_factory=list)
    places: list[int] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)


def gather(
    readers: Sequence[Reader],
    credit: list[float],
    shares: Float[np.ndarray, "rows domains"],
    sequence_length: int,
    packing: Packing,
    most: int,
) -> Pieces:
    """Pieces for OPEN_ROWS rows, or all that there are: each from the domain that is furthest behind its share of the
    tokens, which is then known to within a piece at any time.

    Args:
      credit: tokens that each domain is behind; changed.
      shares: for each row that is to come.
      most: pieces of a row, behind one another.
    """
    pieces, total, limit = Pieces(), 0, OPEN_ROWS * sequence_length
    # Of rows that are filled one after the other.
    filled_rows, room, in_row = 0, sequence_length, 0
    living = list(range(len(readers)))
    for reader in readers:
        reader.begin()
    row, due = -1, []
    while living and (len(pieces.lengths) if packing == "none" else filled_rows) < OPEN_ROWS and total < limit:
        if (now := min(total // sequence_length, OPEN_ROWS - 1)) != row or not due:
            row, due = now, _due(shares[now], living)
        domain = max(due, key=lambda pair: credit[pair[0]])[0]
        if (found := readers[domain].take(room)) is None:
            living.remove(domain)
            due = []
            continue
        place, length = found
        pieces.domains.append(domain)
        pieces.places.append(place)
        pieces.lengths.append(length)
        total += length
        for index, share in due:
            credit[index] += share * length
        credit[domain] -= length
        if packing == "concatenate":
            room, in_row = room - length, in_row + 1
            if not room or in_row == most:
                filled_rows, room, in_row = filled_rows + 1, sequence_length, 0
        # Half a usual piece over the limit is nearer to it than half a piece below.
        if packing == "best fit" and total + total / len(pieces.lengths) > limit:
            break
    return pieces


def _due(shares: Float[np.ndarray, "domains"], living: Sequence[int]) -> list[tuple[int, float]]:
    """The domains that have a share, of those that have text, and their shares of what is to come."""
    given = [(index, float(shares[index])) for index in living if shares[index] > 0]
    if not given:
        given = [(index, 1.0) for index in living]
    whole = sum(share for _, share in given)
    return [(index, share / whole) for index, share in given]


def placed(lengths: Sequence[int], sequence_length: int, packing: Packing, most: int) -> list[int]:
    """The row of each piece, of which none has more than `most`."""
    if packing == "none":
        return list(range(len(lengths)))
    if packing == "concatenate":
        found, row, used, in_row = [], -1, sequence_length, 0
        for length in lengths:
            if used + length > sequence_length or in_row == most:
                row, used, in_row = row + 1, 0, 0
            found.append(row)
            used, in_row = used + length, in_row + 1
        return found
    large = [index for index, length in enumerate(lengths) if length * LARGE >= sequence_length]
    small = [index for index, length in enumerate(lengths) if length * LARGE < sequence_length]
    large.sort(key=lambda index: -lengths[index])
    rows, counts, open_rows = [0] * len(lengths), [], []
    for index in large + small:
        length = lengths[index]
        at = bisect.bisect_left(open_rows, (length, -1))
        if at < len(open_rows):
            room, row = open_rows.pop(at)
        else:
            room, row = sequence_length, len(counts)
            counts.append(0)
        rows[index] = row
        counts[row] += 1
        if room > length and counts[row] < most:
            bisect.insort(open_rows, (room - length, row))
    return rows


def in_order(
    tokens: Int[np.ndarray, "rows domains"],
    shares: Float[np.ndarray, "rows domains"],
    credit: Float[np.ndarray, "domains"],
    generator: np.random.Generator,
) -> list[int]:
    """Rows in an order in which every stretch of them is as near to the shares as it can be; else it is random.

    Args:
      tokens: of each row by domain.
      credit: tokens that each domain was behind when they were gathered.
    """
    left = generator.permutation(len(tokens))
    if tokens.shape[1] == 1:
        return left.tolist()
    behind, order = credit, []
    for number in range(len(tokens)):
        candidates = tokens[left]
        share = shares[min(number, len(shares) - 1)]
        after = behind + candidates.sum(1, keepdims=True) * share - candidates
        best = int(np.argmin((after**2).sum(1)))
        behind = after[best]
        order.append(int(left[best]))
        left = np.delete(left, best)
    return order


def filled(
    pieces: Pieces, taken: Sequence[Taken], rows: Sequence[int], names: Sequence[int], sequence_length: int
) -> Rows:
    """Arrays [rows, sequence_length] of pieces: inputs, targets, positions, segment_ids, domains and weights.

    Args:
      taken: by domain.
      rows: of each piece.
      names: the number that each domain has in the batch.
    """
    shape = (max(rows) + 1, sequence_length)
    whole = ("inputs", "targets", "positions", "segment_ids", "domains")
    out = {field: np.zeros(shape, np.int32) for field in whole} | {"weights": np.zeros(shape, np.float32)}
    inputs, targets, positions, segments, domains, weights = out.values()
    counted = np.arange(sequence_length, dtype=np.int32)
    used, documents = [0] * shape[0], [0] * shape[0]
    # Slices: index arrays over all tokens at once take as long for documents of 80 tokens, and 5 times for long ones.
    for domain, first, length, row in zip(pieces.domains, pieces.places, pieces.lengths, rows, strict=True):
        source, begin = taken[domain], used[row]
        end, behind = begin + length, first + length
        used[row] = end
        documents[row] += 1
        inputs[row, begin:end] = source.tokens[first:behind]
        targets[row, begin:end] = source.tokens[first + 1 : behind + 1]
        positions[row, begin:end] = counted[:length]
        segments[row, begin:end] = documents[row]
        domains[row, begin:end] = names[domain]
        weights[row, begin:end] = source.learnt[first + 1 : behind + 1]
    return out


def documents_in_a_row(sequence_length: int, documents_a_token: float) -> int:
    """How many may be packed into one, the padding behind them counted: a power of two, at least 16 and twice as many
    as a usual row has."""
    usual = max(sequence_length * documents_a_token, 1)
    return max(2 ** math.ceil(math.log2(2 * usual)), 16)
