"""A recipe of two stages that runs in seconds, as a file of the user's."""

import shutil
from pathlib import Path

from inputs import chinese, english, write_jsonl

RECIPE = """
from cpt_jax.adapt import Embeddings, LoRA
from cpt_jax.core.precision import Precision
from cpt_jax.data.holdout import Holdout
from cpt_jax.data.sources import Corpus
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.recipe.recipe import *
from cpt_jax.vocab.extend import ContinuedBPE
from cpt_jax.vocab.gate import Limits

def tiny() -> Recipe:
    held = Holdout(share=0.2, max_bytes=4000)
    shape = dict(batch_size=8, sequence_length=64, optimizer=AdamW(learning_rate=1e-2))
    mixture = {{"zh": 0.75, "en": 0.25}}
    return Recipe(
        name="tiny",
        base={base!r},
        domains=(
            Domain(corpus=Corpus(name="zh", spec={zh!r}), role="new", heldout=held),
            Domain(corpus=Corpus(name="en", spec="en.jsonl"), role="replay", heldout=held),
        ),
        vocabulary=Vocabulary(extension=ContinuedBPE(new_tokens=40), limits=Limits(unreachable_pieces=1.0)),
        stages=(
            Stage(name="rows", method=Embeddings(), mixture={{"zh": 1.0}}, tokens=5 * 512, **shape),
            Stage(name="lora", method=LoRA(rank=4, alpha=8), mixture=mixture, tokens=20 * 512, ema=EMA(decay=0.9), **shape),
        ),
        precision=Precision(compute="float32"),
        evaluation=Evaluation(sequence_length=128),
        samples=Samples(prompts=("the city",), new_tokens=4),
    )
"""


def write_tiny(root: Path, model: Path, *, base: str | None = None, zh: str = "zh.jsonl") -> None:
    """The recipe, `recipes:tiny`, its corpora and its base into a directory to run it in.

    Args:
      base, zh: where they are instead.
    """
    write_jsonl(root / "zh.jsonl", chinese(200))
    write_jsonl(root / "en.jsonl", english(150))
    shutil.copytree(model, root / "base")
    (root / "recipes.py").write_text(RECIPE.format(base=base or str(root / "base"), zh=zh))
