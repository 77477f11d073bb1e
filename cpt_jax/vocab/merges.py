"""Learning BPE merges on text that is already segmented, with incremental pair counts in arrays.

Every merge touches only the places where its pair occurs: 3 million characters and 2,000 merges take seconds.
"""

import collections
import heapq
from collections.abc import Callable, Sequence

import numpy as np

_END = -1
# Places counted at once, in the beginning: bounds the memory of sorting them.
_AT_ONCE = 1 << 23

Pair = tuple[int, int]


class PairCounts:
    """A text as a chain of tokens, cut into words, with the count and the places of each adjacent pair.

    Args:
      words: token ids of each distinct word.
      weights: how often each word occurs.
    """

    def __init__(self, words: Sequence[Sequence[int]], weights: Sequence[int]) -> None:
        lengths = np.fromiter((len(word) for word in words), np.int64, len(words))
        total = int(lengths.sum())
        self.tokens = np.fromiter((token for word in words for token in word), np.int32, total)
        smallest = np.min_scalar_type(max(weights, default=0))
        self.weights = np.repeat(np.asarray(weights, smallest), lengths)
        places = np.arange(total, dtype=np.int32)
        self.after, self.before = places + 1, places - 1
        ends, filled = np.cumsum(lengths), lengths > 0
        self.after[ends[filled] - 1] = _END
        self.before[(ends - lengths)[filled]] = _END
        self.counts: dict[Pair, int] = {}
        # How often each token stands in the text.
        self.uses: collections.Counter[int] = collections.Counter()
        for first in range(0, total, _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            kinds, where = np.unique(self.tokens[part], return_inverse=True)
            sums = np.bincount(where, weights=self.weights[part], minlength=len(kinds))
            self.uses.update(dict(zip(kinds.tolist(), sums.astype(np.int64).tolist(), strict=True)))
        self._places: dict[Pair, list[np.ndarray]] = {}
        self._queue: list[tuple[int, Pair]] = []
        self._deferred: set[Pair] = set()
        starts = places[self.after != _END]
        for first in range(0, len(starts), _AT_ONCE):
            self._add(starts[first : first + _AT_ONCE])

    def _sorted(self, starts: np.ndarray) -> tuple[list[Pair], list[int], np.ndarray, list[int]]:
        """The pairs that begin at `starts`, their counts, the places sorted by pair, and where each pair's begin."""
        keys = self.tokens[starts].astype(np.int64) << 32 | self.tokens[self.after[starts]]
        order = np.argsort(keys, kind="stable")
        keys, starts = keys[order], starts[order]
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)])
        sums = np.add.reduceat(self.weights[starts], first, dtype=np.int64) if len(keys) else first
        keys = keys[first]
        pairs = list(zip((keys >> 32).tolist(), (keys & 0xFFFFFFFF).tolist(), strict=True))
        return pairs, sums.tolist(), starts, [*first.tolist(), len(starts)]

    def _add(self, starts: np.ndarray) -> None:
        pairs, sums, starts, borders = self._sorted(starts)
        for index, (pair, times) in enumerate(zip(pairs, sums, strict=True)):
            count = self.counts[pair] = self.counts.get(pair, 0) + times
            self._places.setdefault(pair, []).append(starts[borders[index] : borders[index + 1]])
            heapq.heappush(self._queue, (-count, pair))

    def _remove(self, starts: np.ndarray) -> None:
        pairs, sums, *_ = self._sorted(starts)
        for pair, times in zip(pairs, sums, strict=True):
            self.counts[pair] -= times
            if pair in self._deferred:
                self._deferred.discard(pair)
                heapq.heappush(self._queue, (-self.counts[pair], pair))

    def most_frequent(
        self, allowed: Callable[[Pair], bool], now: Callable[[Pair, int], bool] = lambda pair, count: True
    ) -> tuple[Pair, int] | None:
        """The most frequent allowed pair and its count (ties: the lowest ids); None when none is left.

        A pair that is not `allowed` is never asked for again; one that is not to be merged `now` is, when it has
        become rarer.
        """
        while self._queue:
            negative, pair = self._queue[0]
            count = self.counts[pair]
            if -negative != count:
                # An old count: the pair has become rarer, or stands in the queue again.
                heapq.heappop(self._queue)
                if 0 < count < -negative:
                    heapq.heappush(self._queue, (-count, pair))
                continue
            if count and allowed(pair):
                if now(pair, count):
                    return pair, count
                self._deferred.add(pair)
            heapq.heappop(self._queue)
        return None

    def merge(self, pair: Pair, merged: int) -> None:
        """Replaces the pair by the token `merged`, left to right, wherever it occurs."""
        found = np.unique(np.concatenate(self._places.pop(pair)))
        # Places are never taken off the lists: what has changed since is sorted out here.
        found = found[(self.tokens[found] == pair[0]) & (self.after[found] != _END)]
        found = found[self.tokens[self.after[found]] == pair[1]]
        if pair[0] == pair[1]:
            found = self._every_other(found)
        second = self.after[found]
        left, right = self.before[found], self.after[second]
        old = np.unique(np.concatenate([left[left != _END], found, second[right != _END]]))
        self._remove(old)
        self.tokens[found], self.tokens[second] = merged, _END
        self.after[found] = right
        self.before[right[right != _END]] = found[right != _END]
        # A left neighbour that was itself merged away has its place taken by its own left half.
        left = self.before[found]
        self._add(np.unique(np.concatenate([left[left != _END], found[right != _END]])))
        times = int(self.weights[found].sum())
        self.uses.update({merged: times})
        self.uses.subtract({pair[0]: times})
        self.uses.subtract({pair[1]: times})

    def _every_other(self, found: np.ndarray) -> np.ndarray:
        """In a run of one token (a a a a), the pairs that do not overlap, from the left."""
        if not len(found):
            return found
        continues = np.concatenate([[False], self.after[found[:-1]] == found[1:]])
        run_start = np.maximum.accumulate(np.where(continues, 0, np.arange(len(found))))
        return found[(np.arange(len(found)) - run_start) % 2 == 0]
