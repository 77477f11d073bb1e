"""Fertility: how many tokens a text costs, before and after, and how many new pieces it takes."""

import dataclasses
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from cpt_jax.vocab.extend import Extension, learn, write_extended
from cpt_jax.vocab.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fertility:
    """Tokens per character and per word (between white space), and UTF-8 bytes per token."""

    tokens_per_character: float
    tokens_per_word: float
    bytes_per_token: float


def fertility(encoded: Sequence[Sequence[int]], texts: Sequence[str]) -> Fertility:
    """Of texts (at least one character) and their tokens."""
    tokens = sum(len(ids) for ids in encoded)
    return Fertility(
        tokens_per_character=tokens / sum(len(text) for text in texts),
        tokens_per_word=tokens / max(1, sum(len(text.split()) for text in texts)),
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
        "tokens_change": sum(map(len, after)) / max(1, sum(map(len, before))) - 1,
        "round_trip_failures": sum(lost),
    }


def speed(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, float]:
    """Megabytes of UTF-8 a second, encoding and decoding all texts."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    started = time.perf_counter()
    ids = tokenizer.encode_documents(list(texts))
    encoded = time.perf_counter()
    tokenizer.backend.decode_batch(ids, skip_special_tokens=False)
    return {"encode": size / (encoded - started), "decode": size / (time.perf_counter() - encoded)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What a vocabulary costs in a model: one row has `row` numbers in all tables, `width` in the head's; the rest of a
    forward pass takes 2 FLOPs for each of `other_parameters` a token (Kaplan et al. 2020, arXiv 2001.08361)."""

    width: int
    row: int
    other_parameters: int


def curve(
    base: Tokenizer,
    extension: Extension,
    texts: Sequence[str],
    protected: Iterable[str],
    heldout: Sequence[str],
    sizes: Sequence[int],
    model: ModelSizes | None,
) -> dict:
    """Fertility on held-out text against the number of new pieces, all prefixes of one learning.

    Where the text gives fewer pieces than the largest size, the last point is all that it gives.

    Returns:
      {"points": [{"new_tokens", "tokens_per_character", and with a model "parameters", "logit_share" (of a token's
      FLOPs), "flops_per_character"}], "knee": a number of new pieces}. The knee is the point farthest below the
      chord of tokens per character over the logarithm of the size (Satopaa et al. 2011, Kneedle).
    """
    largest = dataclasses.replace(extension, new_tokens=max(sizes))
    additions = learn(base, largest, texts, protected)
    available, points = len(additions.pieces), []
    for size in [0, *sorted({min(size, available) for size in sizes})]:
        with tempfile.TemporaryDirectory() as directory:
            if size:
                write_extended(base, additions.chosen(range(size)), Path(directory))
            tokenizer = Tokenizer(Path(directory)) if size else base
            rate = fertility(tokenizer.encode_documents(list(heldout)), heldout).tokens_per_character
        points.append({"new_tokens": size, "tokens_per_character": rate} | _cost(model, base.size + size, size, rate))
    return {"points": points, "knee": knee(points[1:])}


def _cost(model: ModelSizes | None, rows: int, size: int, rate: float) -> dict:
    if model is None:
        return {}
    logits, other = 2 * rows * model.width, 2 * model.other_parameters
    return {
        "parameters": size * model.row,
        "logit_share": logits / (logits + other),
        "flops_per_character": rate * (logits + other),
    }


def knee(points: Sequence[dict]) -> int:
    """The size behind which more pieces bring markedly less."""
    x = np.log([point["new_tokens"] for point in points])
    y = np.array([point["tokens_per_character"] for point in points])
    if len(points) < 3 or y[0] <= y[-1]:
        return points[-1]["new_tokens"] if points else 0
    below = (1 - (x - x[0]) / (x[-1] - x[0])) - (y - y[-1]) / (y[0] - y[-1])
    return points[int(np.argmax(below))]["new_tokens"]
