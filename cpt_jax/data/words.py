"""Runs of words as numbers, by which texts are compared whatever their case, spacing and punctuation."""

import hashlib
from collections.abc import Iterable
from zlib import crc32

import numpy as np
import regex
from jaxtyping import UInt64

# Scripts that put no spaces between words: each character is one.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_WORD = regex.compile(rf"[{_UNSPACED}]|[\p{{L}}\p{{M}}\p{{N}}--{_UNSPACED}]+", regex.V1)
_FACTOR = 0x9E3779B97F4A7C15


def words_of(text: str) -> list[str]:
    """A text's words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def runs_of(text: str, length: int) -> UInt64[np.ndarray, "runs"]:
    """A number for every run of `length` words of a text, in order; one run where there are fewer words."""
    words = words_of(text)
    if not words:
        return np.zeros(0, np.uint64)
    numbers = np.fromiter((crc32(word.encode()) for word in words), np.uint64, len(words))
    length = min(length, len(numbers))
    count = len(numbers) - length + 1
    runs = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for index in range(length):
            runs = runs * np.uint64(_FACTOR) + numbers[index : index + count] + np.uint64(1)
        # Mixed (the finaliser of splitmix64), so that its low bits can be taken alone.
        runs ^= runs >> np.uint64(30)
        runs *= np.uint64(0xBF58476D1CE4E5B9)
        runs ^= runs >> np.uint64(27)
        runs *= np.uint64(0x94D049BB133111EB)
        return runs ^ (runs >> np.uint64(31))


class EvaluationTexts:
    """The runs of words of what a model is measured on, by which text that gives it away is found: a document that
    shares `length` words in a row with it (13 in Brown et al. 2020, arXiv 2005.14165, appendix C). A text of fewer words
    gives no run."""

    def __init__(self, sets: Iterable[tuple[str, Iterable[str]]], length: int) -> None:
        self.length = length
        self.names: list[str] = []
        runs, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint16)]
        for name, texts in sets:
            for text in texts:
                if len(words_of(text)) >= length:
                    runs.append(runs_of(text, length))
                    owners.append(np.full(len(runs[-1]), len(self.names), np.uint16))
            self.names.append(name)
        self._runs, first = np.unique(np.concatenate(runs), return_index=True)
        self._owners = np.concatenate(owners)[first]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the runs."""
        return hashlib.sha256(self._runs.tobytes() + repr((self.length, self.names)).encode()).hexdigest()

    def reason(self, text: str) -> str | None:
        """Why a text may not be learnt, if it shares a run with an evaluation set."""
        if not len(self._runs):
            return None
        found = runs_of(text, self.length)
        places = np.minimum(np.searchsorted(self._runs, found), len(self._runs) - 1)
        shared = places[self._runs[places] == found]
        return f"{self.length} words in a row of {self.names[self._owners[shared[0]]]}" if len(shared) else None
