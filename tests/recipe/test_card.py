"""The model card, where it speaks of the base."""

import dataclasses
from pathlib import Path

import pytest

from cpt_jax.data.sources import Corpus
from cpt_jax.recipe.card import model_card
from cpt_jax.recipe.recipe import Domain, Export, Recipe

RECIPE = Recipe(
    name="run", base="", domains=(Domain(corpus=Corpus(name="zh", spec="zh.jsonl"), role="new"),), stages=()
)


@pytest.mark.parametrize(
    ("base", "called", "on_the_hub"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M", True),
        ("models/llama", "llama", False),
        ("models/llama.gguf", "llama.gguf", False),
        ("runs/first/export", "first", False),
        ("gs://bucket/runs/first/export/", "first", False),
        ("/home/me/models/llama", "llama", False),
        ("./export", "export", False),
    ],
)
def test_a_base_has_the_name_that_others_know_it_by(tmp_path, monkeypatch, base, called, on_the_hub):
    monkeypatch.chdir(tmp_path)
    Path("models/llama").mkdir(parents=True)
    card = model_card(dataclasses.replace(RECIPE, base=base), Export(), [], {})
    assert f"\n`{called}`, continued in pre-training on zh" in card
    assert (f'\nbase_model: "{base}"\n' in card) == on_the_hub == ("base_model" in card)
