"""What a corpus is like: lengths, scripts, and a few texts to look at, of what stays and of what is left out."""

import collections
import functools
import hashlib
import heapq
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import regex

# Texts to look at: of what stays, and of each reason for leaving out.
KEPT_SAMPLES, LEFT_OUT_SAMPLES = 200, 20
SAMPLE_CHARACTERS = 600
# Unicode's names; the last ones stand for what is written in any script, and for the rest.
SCRIPTS = [
    "Latin",
    "Han",
    "Cyrillic",
    "Arabic",
    "Devanagari",
    "Hiragana",
    "Katakana",
    "Hangul",
    "Greek",
    "Hebrew",
    "Thai",
    "Bengali",
    "Tamil",
    "Telugu",
    "Gujarati",
    "Gurmukhi",
    "Kannada",
    "Malayalam",
    "Sinhala",
    "Khmer",
    "Lao",
    "Myanmar",
    "Tibetan",
    "Ethiopic",
    "Georgian",
    "Armenian",
    "Mongolian",
    "Inherited",
    "Common",
]
OTHER = "other"
# Emoji and the rarer Han are in planes 1 to 3.
_CODE_POINTS = 0x40000


class Samples:
    """The texts of the smallest hashes: a sample that does not depend on the order they come in."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._heap: list[tuple[int, str]] = []

    def add(self, text: str) -> None:
        shown = text[:SAMPLE_CHARACTERS]
        self._push(int.from_bytes(hashlib.blake2b(shown.encode(), digest_size=6).digest(), "big"), shown)

    def _push(self, value: int, text: str) -> None:
        if len(self._heap) == self._limit and -value <= self._heap[0][0]:
            return
        if (-value, text) in self._heap:
            return
        heapq.heappush(self._heap, (-value, text))
        if len(self._heap) > self._limit:
            heapq.heappop(self._heap)

    def merge(self, entries: Iterable[Sequence]) -> None:
        for value, text in entries:
            self._push(value, text)

    def entries(self) -> list[tuple[int, str]]:
        return sorted((-value, text) for value, text in self._heap)


@functools.cache
def _script_table() -> np.ndarray:
    """The number of each code point's script in `SCRIPTS`; their count for others."""
    table = np.full(_CODE_POINTS, len(SCRIPTS), np.uint8)
    surrogates = range(0xD800, 0xE000)
    every = "".join(chr(point) for point in range(_CODE_POINTS) if point not in surrogates)
    points = np.frombuffer(every.encode("utf-32-le"), "<u4")
    for number, script in enumerate(SCRIPTS):
        for match in regex.finditer(rf"\p{{Script={script}}}+", every):
            table[points[match.start() : match.end()]] = number
    return table


def scripts_of(texts: Iterable[str]) -> collections.Counter[str]:
    """Characters by script; spaces, digits and punctuation are "Common"."""
    points = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")
    table = _script_table()
    counts = np.bincount(table[np.minimum(points, _CODE_POINTS - 1)], minlength=len(SCRIPTS) + 1)
    return collections.Counter(
        {name: int(count) for name, count in zip((*SCRIPTS, OTHER), counts, strict=True) if count}
    )


def length_bin(length: int) -> int:
    """Two bins for every doubling: `length` is at least 2^(bin/2), and below 2^((bin+1)/2)."""
    return int(2 * math.log2(length)) if length else -1


class Statistics:
    """Counts over documents, which can be put together in any order.

    lengths: documents by `length_bin` of their tokens, and characters of theirs; scripts: characters by script.
    """

    def __init__(self) -> None:
        self.token_lengths: collections.Counter[int] = collections.Counter()
        self.character_lengths: collections.Counter[int] = collections.Counter()
        self.scripts: collections.Counter[str] = collections.Counter()
        self.kept = Samples(KEPT_SAMPLES)
        self.left_out: dict[str, Samples] = {}

    def add(self, texts: Sequence[str], tokens: Sequence[int]) -> None:
        """Documents that stay, and how many tokens each has."""
        self.token_lengths.update(map(length_bin, tokens))
        self.character_lengths.update(length_bin(len(text)) for text in texts)
        self.scripts.update(scripts_of(texts))
        for text in texts:
            self.kept.add(text)

    def leave_out(self, reason: str, text: str) -> None:
        self.left_out.setdefault(reason, Samples(LEFT_OUT_SAMPLES)).add(text)

    def merge(self, written: Mapping) -> None:
        """Adds what `to_json` gave."""
        for name in ("token_lengths", "character_lengths"):
            getattr(self, name).update({int(place): count for place, count in written[name].items()})
        self.scripts.update(written["scripts"])
        self.kept.merge(written["kept"])
        for reason, entries in written["left_out"].items():
            self.left_out.setdefault(reason, Samples(LEFT_OUT_SAMPLES)).merge(entries)

    def to_json(self) -> dict:
        return {
            "token_lengths": {str(place): count for place, count in sorted(self.token_lengths.items())},
            "character_lengths": {str(place): count for place, count in sorted(self.character_lengths.items())},
            "scripts": dict(sorted(self.scripts.items(), key=lambda entry: (-entry[1], entry[0]))),
            "kept": self.kept.entries(),
            "left_out": {reason: self.left_out[reason].entries() for reason in sorted(self.left_out)},
        }
