"""What new rows are computed from: text, tables of old rows, the pieces of an extended tokenizer."""

from pathlib import Path

import numpy as np
import pytest
from inputs import chinese

from cpt_jax.vocab.init_rows import RowContext
from cpt_jax.vocab.tokenizer import Tokenizer

TEXTS = chinese(200, seed=2)
NEW = 60


def context_of(base: Path, extended: Path, texts=TEXTS, pieces=None) -> RowContext:
    from cpt_jax.vocab.extend import old_segmentation

    before, after = Tokenizer(base), Tokenizer(extended)
    found = old_segmentation(before, after) if pieces is None else pieces
    no_model = lambda: pytest.fail("needs no model")  # noqa: E731
    return RowContext(pieces=found, base=before, extended=after, texts=lambda: texts, model=no_model, seed=3)


def table(rows: int, width: int = 8) -> np.ndarray:
    generator = np.random.default_rng(0)
    return (generator.normal(0, 1, (rows, width)) @ np.diag(np.arange(1, width + 1)) + 3).astype(np.float32)
