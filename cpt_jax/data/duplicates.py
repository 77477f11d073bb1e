"""Documents that are in a corpus more than once: the same text, or nearly the same (MinHash: Broder 1997; locality
sensitive hashing by bands: Leskovec et al., Mining of Massive Datasets, chapter 3).

Of a group of duplicates the first in the corpus's order stays, so what is left out does not depend on who looked.
"""

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
from jaxtyping import Int64, UInt8, UInt32, UInt64

from cpt_jax.core.errors import UserError
from cpt_jax.data.words import runs_of

PERMUTATIONS = 128
# A shingle's words: texts that agree in most runs of five words are the same text, edited.
SHINGLE_WORDS = 5
# Hashes looked at together: 24 bytes each.
_AT_ONCE = 40_000_000
_PAIRS_AT_ONCE = 50_000

KEPT, EXACT, NEAR = 0, 1, 2
REASONS = {EXACT: "duplicate", NEAR: "near duplicate"}


def _datasketch() -> Any:
    try:
        import datasketch
    except ModuleNotFoundError as error:
        raise UserError(
            "near duplicates need the package datasketch: pip install datasketch, or cpt_jax[cleaning]"
        ) from error
    return datasketch


class Signer:
    """MinHash signatures of texts, by datasketch, over runs of `SHINGLE_WORDS` words."""

    def __init__(self) -> None:
        self._minhash = _datasketch().MinHash
        self._permutations = self._minhash(PERMUTATIONS).permutations

    def signature(self, text: str) -> UInt32[np.ndarray, "permutations"]:
        """The share of equal entries of two signatures is about the share of runs that two texts have in common."""
        # 32 bits of each run: datasketch's default scheme. A list would be hashed one by one.
        runs = np.unique(runs_of(text, SHINGLE_WORDS).astype(np.uint32))
        if not len(runs):
            # Without a word (emoji, a formula) a text is like none but itself.
            runs = np.array([crc32(text.encode())], np.uint32)
        sketch = self._minhash(
            PERMUTATIONS, permutations=self._permutations, scheme="affine32", hashfunc=lambda run: run
        )
        # A book at once would be 128 numbers for each of its words.
        for start in range(0, len(runs), 4096):
            sketch.update_batch(runs[start : start + 4096])
        return np.asarray(sketch.hashvalues, np.uint32)


def exact_duplicates(hashes: Sequence[np.ndarray]) -> list[UInt8[np.ndarray, "documents"]]:
    """EXACT for every document whose text came before. `hashes`: of each split, in order, those of its documents, uint64
    [documents, 2], which may lie in a file. Memory is bounded: shares of them, by value, one after the other."""
    sizes = list(map(len, hashes))
    found = np.zeros(sum(sizes), np.uint8)
    shares = 1 + sum(sizes) // _AT_ONCE
    for share in range(shares):
        values, places = [], []
        for first, rows in zip(np.cumsum([0, *sizes]), hashes, strict=False):
            mine = np.flatnonzero(rows[:, 0] % np.uint64(shares) == share)
            values.append(rows[mine])
            places.append(mine + first)
        value, place = np.concatenate(values), np.concatenate(places)
        # Stable: of equal texts the first comes first.
        order = np.lexsort((place, value[:, 1], value[:, 0]))
        again = np.flatnonzero((value[order[1:]] == value[order[:-1]]).all(axis=1))
        found[place[order[again + 1]]] = EXACT
    return np.split(found, np.cumsum(sizes)[:-1])


def near_duplicates(
    signatures: Sequence[np.ndarray], left_out: Sequence[UInt8[np.ndarray, "documents"]], threshold: float
) -> list[UInt8[np.ndarray, "documents"]]:
    """NEAR besides what was left out, for documents like an earlier one: their signatures agree in `threshold` of their
    entries, or there are others between them that do. `signatures`: of each split, those of its documents,
    uint32 [documents, permutations], which may lie in a file."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # Candidates are compared afterwards: what is missed costs, and what is looked at in vain does not. At 0.8 in common,
    # 98 of 100 pairs are candidates.
    index = _datasketch().MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.02, 0.98))
    stored = _Stored(signatures)
    found = np.concatenate(left_out)
    candidates = np.flatnonzero(found == KEPT)
    # A pair as one number, so that one that several bands give is looked at once.
    pairs = np.zeros(0, np.int64)
    for band in range(index.b):
        first, second = _pairs(stored.column(band * index.r, (band + 1) * index.r)[candidates])
        new = np.setdiff1d(candidates[first] * stored.count + candidates[second], pairs)
        alike = stored.agreement(*np.divmod(new, stored.count)) >= threshold
        pairs = np.union1d(pairs, new[alike])
    documents, ends = np.unique(np.divmod(pairs, max(1, stored.count)), return_inverse=True)
    first, second = ends.reshape(2, -1)
    links = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(len(documents), len(documents)))
    groups = connected_components(links, directed=False)[1] if len(documents) else np.zeros(0, np.int64)
    # Documents are in the corpus's order: the first of a group is the first that is met.
    earliest = np.unique(groups, return_index=True)[1]
    found[np.delete(documents, earliest)] = NEAR
    return np.split(found, stored.firsts[1:-1])


def _pairs(
    values: UInt64[np.ndarray, "documents"],
) -> tuple[Int64[np.ndarray, "pairs"], Int64[np.ndarray, "pairs"]]:
    """Documents of the same value, each with the one before and with the first of them: all pairs of a page that is
    there a thousand times would be half a million."""
    order = np.argsort(values, kind="stable")
    same = np.concatenate([[False], values[order[1:]] == values[order[:-1]]])
    starts = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    later = np.flatnonzero(same)
    first = np.concatenate([order[later - 1], order[starts[later]]])
    return first, np.concatenate([order[later], order[later]])


class _Stored:
    """Signatures in parts, of which a little is looked at."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = parts
        self.firsts = np.cumsum([0, *map(len, self._parts)])
        self.count = int(self.firsts[-1])

    def column(self, start: int, stop: int) -> UInt64[np.ndarray, "documents"]:
        """One number for some entries of every signature."""
        values = np.zeros(self.count, np.uint64)
        for first, part in zip(self.firsts, self._parts, strict=False):
            here = values[first : first + len(part)]
            for entry in range(start, stop):
                here *= np.uint64(0x9E3779B97F4A7C15)
                here += part[:, entry] + np.uint64(1)
        return values

    def agreement(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The share of equal entries of pairs of signatures."""
        shares = [np.zeros(0)]
        for start in range(0, len(first), _PAIRS_AT_ONCE):
            stop = start + _PAIRS_AT_ONCE
            shares.append((self._rows(first[start:stop]) == self._rows(second[start:stop])).mean(axis=1))
        return np.concatenate(shares)

    def _rows(self, places: np.ndarray) -> UInt32[np.ndarray, "rows permutations"]:
        rows = np.zeros((len(places), PERMUTATIONS), np.uint32)
        owners = np.searchsorted(self.firsts, places, side="right") - 1
        for owner in np.unique(owners):
            mine = owners == owner
            rows[mine] = self._parts[owner][places[mine] - self.firsts[owner]]
        return rows
