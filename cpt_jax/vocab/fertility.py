"""Fertility: how many tokens a text costs, before and after."""

import dataclasses
from collections.abc import Sequence

from cpt_jax.vocab.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fertility:
    """Tokens per character, and UTF-8 bytes per token."""

    tokens_per_character: float
    bytes_per_token: float


def fertility(encoded: Sequence[Sequence[int]], texts: Sequence[str]) -> Fertility:
    """Of texts (at least one character) and their tokens."""
    tokens = sum(len(ids) for ids in encoded)
    return Fertility(
        tokens_per_character=tokens / sum(len(text) for text in texts),
        bytes_per_token=sum(len(text.encode()) for text in texts) / max(1, tokens),
    )


def compare(name: str, base: Tokenizer, extended: Tokenizer, texts: Sequence[str]) -> dict:
    """One corpus under both tokenizers, as `cpt tokenizer report` gives it; shares are between 0 and 1."""
    before, after = base.encode_documents(list(texts)), extended.encode_documents(list(texts))
    # A text that the base itself does not give back (one that holds a special token's name, say) is no failure of
    # the extension.
    lost = [
        extended.decode(new) != text and base.decode(old) == text
        for old, new, text in zip(before, after, texts, strict=True)
    ]
    return {
        "name": name,
        "base": dataclasses.asdict(fertility(before, texts)),
        "extended": dataclasses.asdict(fertility(after, texts)),
        "documents": len(texts),
        "documents_changed": sum(a != b for a, b in zip(before, after, strict=True)) / len(texts),
        "round_trip_failures": sum(lost),
    }
