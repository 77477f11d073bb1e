"""Which pieces may be added: the user's limits, and what no piece may hold."""

import dataclasses
import functools
import hashlib
import heapq
import unicodedata
from collections.abc import Iterable, Sequence

import regex

from cpt_jax.core.errors import UserError

# Line breaks and tabs are text, and zero-width joiners belong to the spelling of Persian and Hindi.
TEXT_CONTROLS = frozenset("\t\n\r\u200c\u200d")
REFUSED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Cn", "Co"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """What to learn from a corpus, and which pieces to keep to.

    Attributes:
      new_tokens: how many pieces are learnt from the corpus, at most.
      min_frequency: every learnt piece stands in the corpus at least so often, counted after all of them were learnt
        (`continued-bpe`), or before (`union`).
      max_piece_characters: none is longer.
      scripts: Unicode scripts ("Han", "Hiragana") that a piece's letters must belong to; empty: any.
      banned: pieces that are never added, with or without a space before them.
      candidates: pieces that are added besides the learnt ones, a domain's terms, say.
      tolerance: how frequent a pair of tokens may be in the old text, per token, against the new text, and still be merged
        by `continued-bpe`. 0: old text is cut as before. With 0.01, old text that holds a little of the new language (a
        few pages, or names) is cut otherwise there, and does not keep that language's characters apart everywhere.
      sample_bytes: of a larger corpus, whole documents chosen by hash up to this size are learnt from, or protected.
    """

    new_tokens: int
    min_frequency: int = 2
    max_piece_characters: int = 16
    scripts: tuple[str, ...] = ()
    banned: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    tolerance: float = 0.0
    sample_bytes: int = 200_000_000

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise UserError(
                f"tolerance is {self.tolerance}: give a share from 0 (old text stays as it is) to, say, 0.0001"
            )
        if self.new_tokens < (0 if self.candidates else 1):
            raise UserError(f"new_tokens is {self.new_tokens}: give at least 1, or leave the vocabulary as it is")
        for name in ("min_frequency", "max_piece_characters", "sample_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")
        for script in self.scripts:
            try:
                regex.compile(rf"\p{{Script={script}}}")
            except regex.error as error:
                raise UserError(f"{script!r} is no Unicode script: give names like Han, Hiragana, Cyrillic") from error

    @functools.cached_property
    def _letters(self) -> regex.Pattern:
        wanted = "".join(rf"\p{{Script={script}}}" for script in self.scripts)
        return regex.compile(rf"(?:[{wanted}]|[^\p{{L}}\p{{M}}])*")

    def allows(self, text: str, special: Sequence[str]) -> bool:
        """Whether a learnt piece may be added; `text` is what it stands for, broken characters at its ends left
        out."""
        if wrong := forbidden(text, special):
            return not wrong
        if text.removeprefix(" ") in self.banned:
            return False
        if not self.scripts or not text:
            return True
        return regex.search(r"[\p{L}\p{M}]", text) is not None and self._letters.fullmatch(text) is not None

    def check_candidates(self, special: Sequence[str]) -> None:
        """Raises UserError for a candidate that no tokenizer should have."""
        for text in self.candidates:
            if not text.strip():
                raise UserError(f"candidate {text!r} is empty: give one term a line")
            if wrong := forbidden(text, special):
                raise UserError(f"candidate {text!r} holds {wrong}: leave it out")
            if text.removeprefix(" ") in self.banned:
                raise UserError(f"{text!r} is a candidate and banned: decide which")


def forbidden(text: str, special: Sequence[str]) -> str | None:
    """Why a text can be no piece, whoever asks for it; None when it can."""
    for character in text:
        if unicodedata.category(character) in REFUSED_CATEGORIES and character not in TEXT_CONTROLS:
            return f"the control or private character U+{ord(character):04X}"
    for token in special:
        if token in text:
            return f"the special token {token!r}"
    return None


def sampled(texts: Iterable[str], limit: int) -> tuple[list[str], int, int]:
    """(kept documents, their bytes, all bytes): those with the lowest hashes, up to `limit` bytes of UTF-8.

    One pass, memory bounded by `limit`, the same choice wherever the documents come from.
    """
    kept: list[tuple[int, int, int, str]] = []
    size = total = 0
    for index, text in enumerate(texts):
        length = len(text.encode())
        total += length
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
        # A heap with the highest hash on top: the first to go.
        heapq.heappush(kept, (-digest, index, length, text))
        size += length
        while size > limit and len(kept) > 1:
            size -= heapq.heappop(kept)[2]
    return [text for *_, text in sorted(kept, key=lambda entry: entry[1])], size, total
