"""SmolLM2-135M learns Chinese law in some ten minutes on two CPU cores, with and without growing the vocabulary."""

import dataclasses
from typing import Any

from configs.quickstart_inputs import DIRECTORY
from cpt_jax.adapt import Embeddings, LoRA
from cpt_jax.core.errors import UserError
from cpt_jax.data.holdout import Holdout
from cpt_jax.data.sources import Corpus
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.optim.schedules import Cosine
from cpt_jax.recipe.recipe import Domain, Recipe, Samples, Stage, Vocabulary
from cpt_jax.vocab.extend import ContinuedBPE
from cpt_jax.vocab.init_rows import SubwordMean

# One step: two rows of 256 tokens, whole articles packed into each.
SHAPE: dict[str, Any] = {"batch_size": 2, "sequence_length": 256}
STEP_TOKENS = SHAPE["batch_size"] * SHAPE["sequence_length"]

PROMPTS = (
    "国务院有关部门应当",
    "违反本法规定，",
    "The history of the city began",
)


def _domains() -> tuple[Domain, ...]:
    if not (DIRECTORY / "statutes.jsonl").exists():
        raise UserError(
            "the quickstart's inputs are not there: run `make inputs` (or python -m configs.quickstart_inputs)"
        )
    # A law's articles are held out together: no article of a held-out law is ever seen.
    statutes = Corpus(name="statutes", spec=str(DIRECTORY / "statutes.jsonl"), group_field="law")
    english = Corpus(name="english", spec=str(DIRECTORY / "wikipedia.jsonl"))
    python = Corpus(name="python", spec=str(DIRECTORY / "python.jsonl"))
    return (
        Domain(corpus=statutes, role="new", heldout=Holdout(share=0.1, max_bytes=12_000)),
        Domain(corpus=english, role="replay", heldout=Holdout(share=0.1, max_bytes=12_000)),
        Domain(corpus=python, role="watch", heldout=Holdout(share=1.0, max_bytes=8_000)),
    )


def quickstart() -> Recipe:
    """2,000 new pieces; their rows alone first, then LoRA on everything with 25% English replayed."""
    return Recipe(
        name="quickstart",
        base=str(DIRECTORY / "SmolLM2-135M-Instruct.Q4_1.gguf"),
        domains=_domains(),
        vocabulary=Vocabulary(extension=ContinuedBPE(new_tokens=2000), initial_rows=SubwordMean()),
        stages=(
            Stage(
                name="embeddings",
                method=Embeddings(rows="new"),
                mixture={"statutes": 1.0},
                tokens=20 * STEP_TOKENS,
                optimizer=AdamW(learning_rate=5e-3, new_rows_epsilon=1e-3),
                **SHAPE,
            ),
            Stage(
                name="lora",
                method=LoRA(rank=16, alpha=32),
                mixture={"statutes": 0.75, "english": 0.25},
                tokens=180 * STEP_TOKENS,
                optimizer=AdamW(learning_rate=2e-3, new_rows_multiplier=2.5),
                schedule=Cosine(warmup=0.05, final=0.05),
                ema=EMA(decay=0.98),
                **SHAPE,
            ),
        ),
        samples=Samples(prompts=PROMPTS, new_tokens=40),
    )


def quickstart_base_vocabulary() -> Recipe:
    """The same budget with the base's own vocabulary: LoRA alone, as many tokens in all."""
    grown = quickstart()
    (embeddings, lora) = grown.stages
    stage = dataclasses.replace(
        lora,
        method=LoRA(rank=16, alpha=32, new_rows=False),
        tokens=embeddings.tokens + lora.tokens,
        optimizer=AdamW(learning_rate=2e-3),
    )
    return dataclasses.replace(grown, name="quickstart_base_vocabulary", vocabulary=None, stages=(stage,))
