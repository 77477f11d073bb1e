"""A base tokenizer as merge learning sees it: text cut into words that no merge crosses, words into tokens.

Two kinds: byte-level BPE, whose pieces are bytes written as characters (GPT-2's table), and BPE over characters with
byte fallback, as SentencePiece makes it, where a character that is no piece is spelt in bytes.
"""

import collections
import itertools
import re
from collections.abc import Iterable, Sequence

import regex

from cpt_jax.core.errors import UserError
from cpt_jax.vocab.sentencepiece_model import SPACE
from cpt_jax.vocab.tokenizer import BYTE, Tokenizer, byte_alphabet


class Segmentation:
    """What the two kinds share.

    Attributes:
      ids: the base's pieces and, while learning goes on, the new ones.
      pieces: the same the other way round.
      first_new: the first id that is no piece of the base.
    """

    # Whether any two neighbours that spell a piece are merged into it, or only those that a merge names.
    merges_by_spelling = False

    def __init__(self, base: Tokenizer) -> None:
        self.base = base
        self.ids: dict[str, int] = dict(base.document["model"]["vocab"])
        self.pieces = {index: piece for piece, index in self.ids.items()}
        self.first_new = base.size
        added = base.document["added_tokens"]
        self.special = [token["content"] for token in added if token["special"]]
        # Tokens of their own before any merge, as GPT-NeoX's runs of spaces.
        apart = sorted((token["content"] for token in added if not token["special"]), key=len, reverse=True)
        self._apart = re.compile("|".join(map(re.escape, apart)) or "(?!)")

    def words(self, texts: Iterable[str]) -> dict[str, int]:
        """How often each word occurs, in the base's inner spelling."""
        normalizer, split = self.base.backend.normalizer, self.base.backend.pre_tokenizer
        counts: collections.Counter[str] = collections.Counter()
        for between in itertools.chain.from_iterable(map(self._apart.split, texts)):
            # A normalizer may put a space before it.
            if not between:
                continue
            text = between if normalizer is None else normalizer.normalize_str(between)
            parts = [text] if split is None else [part for part, _ in split.pre_tokenize_str(text)]
            counts.update(word for part in parts for word in self.cut(part))
        return dict(counts)

    def cut(self, part: str) -> Sequence[str]:
        """A pre-token as words."""
        return (part,)

    def segments(self, words: Iterable[str]) -> list[list[int]]:
        """Each word's token ids."""
        model = self.base.backend.model
        return [[token.id for token in model.tokenize(word)] for word in words]

    def spelling(self, text: str) -> list[str]:
        """A text of the user in the inner spelling, as words."""
        normalizer, split = self.base.backend.normalizer, self.base.backend.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        return [part for part, _ in split.pre_tokenize_str(text)] if split is not None else [text]

    def text(self, piece: str) -> str:
        """What a piece stands for, broken characters at its ends left out."""
        raise NotImplementedError

    def characters(self, piece: str) -> int:
        """Characters that begin in a piece."""
        raise NotImplementedError

    def joins(self, piece: str) -> bool:
        """Whether merge learning may make such a piece at all."""
        raise NotImplementedError

    def splits(self, piece: str) -> list[tuple[int, int]]:
        """The pairs of present pieces that spell this one."""
        found = []
        for cut in range(1, len(piece)):
            left, right = self.ids.get(piece[:cut]), self.ids.get(piece[cut:])
            if left is not None and right is not None:
                found.append((left, right))
        return found


class ByteLevel(Segmentation):
    """GPT-2, Llama 3, Qwen, SmolLM."""

    def text(self, piece: str) -> str:
        return bytes(byte_alphabet()[character] for character in piece).decode(errors="ignore")

    def characters(self, piece: str) -> int:
        alphabet = byte_alphabet()
        return sum(1 for character in piece if alphabet[character] & 0xC0 != 0x80)

    def joins(self, piece: str) -> bool:
        return True


class CharacterBPE(Segmentation):
    """LLaMA, Mistral, Gemma: pieces are characters, spaces written as U+2581.

    A character that is no piece of the base has an id of its own from `unknown` on, so that it can be learnt.
    """

    merges_by_spelling = True
    # As SentencePiece's own trainer: letters of one script, and digits, do not join with anything else.
    _unmixed = regex.compile(
        r"▁?(?:[\p{Han}\p{Hiragana}\p{Katakana}ー々〇]+|\p{Latin}+|[^\p{L}\p{M}\p{N}▁]+"
        r"|(?:(?![\p{Han}\p{Hiragana}\p{Katakana}\p{Latin}])[\p{L}\p{M}])+|\p{N}+)|▁"
    )

    def __init__(self, base: Tokenizer) -> None:
        super().__init__(base)
        self.unknown = 1 << 30
        self.splits_digits = base.sentencepiece is None or base.sentencepiece.trainer_spec.split_digits

    def cut(self, part: str) -> Sequence[str]:
        return re.findall(f"{SPACE}?[^{SPACE}]+", part)

    def spelling(self, text: str) -> list[str]:
        # The space that the tokenizer puts before a text is no part of the user's term.
        return [text.replace(" ", SPACE)]

    def segments(self, words: Iterable[str]) -> list[list[int]]:
        model, result = self.base.backend.model, []
        for word in words:
            ids: list[int] = []
            spelt: list[int] = []
            for token in model.tokenize(word):
                if match := BYTE.fullmatch(token.value):
                    spelt.append(int(match[1], 16))
                    continue
                ids.extend(self._characters(spelt))
                spelt = []
                ids.append(token.id)
            ids.extend(self._characters(spelt))
            result.append(ids)
        return result

    def _characters(self, spelt: list[int]) -> list[int]:
        characters = bytes(spelt).decode(errors="replace")
        for character in characters:
            if character not in self.ids:
                index = self.unknown + len(self.ids)
                self.ids[character], self.pieces[index] = index, character
        return [self.ids[character] for character in characters]

    def text(self, piece: str) -> str:
        return piece.replace(SPACE, " ")

    def characters(self, piece: str) -> int:
        return len(piece.replace(SPACE, ""))

    def joins(self, piece: str) -> bool:
        if self.splits_digits and len(piece) > 1 and any(character.isdigit() for character in piece):
            return False
        return self._unmixed.fullmatch(piece) is not None


def segmentation_of(base: Tokenizer) -> Segmentation:
    """The base's kind.

    Raises:
      UserError: merges cannot be learnt for it.
    """
    kind = kind_of(base)
    if kind == "unigram":
        raise UserError(f"{base.directory}: a unigram tokenizer has no merges to go on from: use --method union")
    return ByteLevel(base) if kind == "byte-level" else CharacterBPE(base)


def kind_of(base: Tokenizer) -> str:
    """ "byte-level", "characters" (BPE with byte fallback), or "unigram".

    Raises:
      UserError: it is of a kind that cannot be extended.
    """
    model = base.document["model"]
    steps = base.document["pre_tokenizer"] or {}
    steps = {steps.get("type"), *(step["type"] for step in steps.get("pretokenizers", []))}
    if model["type"] == "Unigram":
        return "unigram"
    if model["type"] == "BPE" and "ByteLevel" in steps:
        return "byte-level"
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return "characters"
    raise UserError(
        f"{base.directory}: a tokenizer of kind {model['type']} cannot be extended: byte-level BPE (GPT-2, Llama 3, Qwen), SentencePiece BPE "
        "with byte fallback (LLaMA, Mistral) and unigram can; keep its vocabulary (new pieces 0)"
    )
