"""Is growing the vocabulary worth it, and do the new rows want training of their own first?

Question: the small base's 8,192 pieces were learned from English; a Chinese character takes up to three. With 0, 1,000, 4,000 and 16,000 new pieces, what do held-out
statutes cost in bits per byte after the same text, and after the same compute? And with the rows alone first (a tenth of the steps)?

Expectation: at equal text, more pieces are worse (fewer steps, rows that are new); at equal compute (tokens), 1,000 to 4,000 are better than none, since each token is worth more text, and
16,000 have too many rows to train. Rows first helps little: with everything training they move fastest anyway.

Result: the base spends three tokens on a character, and more pieces are better up to 16,000 at equal compute (1.94, 1.59, 1.46, 1.37), better from 4,000 on at equal text (16,000: 1.55), and rows first helps (16,000: 1.33), all three against what was expected.

`cpt sweep experiments.growing:chinese`: two seeds; 25% English.
"""

import dataclasses

from cpt_jax.adapt import Embeddings
from cpt_jax.recipe.recipe import Recipe, Vocabulary
from cpt_jax.vocab.extend import ContinuedBPE
from cpt_jax.vocab.gate import Limits
from experiments.small_base import BUDGET, adapted

PIECES = (1000, 4000, 16_000)
SEEDS = (0, 1)
# Tokens of the statutes with so many pieces over tokens with none, on held-out text (docs/vocabulary.md).
FEWER = {1000: 0.282, 4000: 0.184, 16_000: 0.142}


def _grown(recipe: Recipe, pieces: int) -> Recipe:
    vocabulary = Vocabulary(
        extension=ContinuedBPE(new_tokens=pieces, tolerance=0.01), limits=Limits(unreachable_pieces=1.0)
    )
    return dataclasses.replace(recipe, vocabulary=vocabulary)


def _rows_first(recipe: Recipe) -> Recipe:
    """A tenth of the tokens for the new rows alone."""
    (stage,) = recipe.stages
    alone, rest = stage.tokens // 10, stage.tokens - stage.tokens // 10
    optimizer = dataclasses.replace(stage.optimizer, learning_rate=5e-3)
    rows = dataclasses.replace(stage, name="rows", method=Embeddings(), tokens=alone, optimizer=optimizer, ema=None)
    return dataclasses.replace(recipe, stages=(rows, dataclasses.replace(stage, tokens=rest)))


def chinese() -> list[Recipe]:
    runs = []
    for seed in SEEDS:
        runs.append(adapted(f"none-{seed}", "chinese", 0.25, seed=seed))
        for pieces in PIECES:
            same_text = round(BUDGET.tokens * (0.25 + 0.75 * FEWER[pieces]))
            plain = _grown(adapted(f"{pieces}-equal-compute-{seed}", "chinese", 0.25, seed=seed), pieces)
            runs.append(plain)
            runs.append(dataclasses.replace(_rows_first(plain), name=f"{pieces}-rows-first-{seed}"))
            text = adapted(f"{pieces}-equal-text-{seed}", "chinese", 0.25, seed=seed, tokens=same_text)
            runs.append(_grown(text, pieces))
    return runs
