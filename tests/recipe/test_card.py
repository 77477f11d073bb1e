"""The model card, where it speaks of the base."""

import dataclasses
import re
from pathlib import Path

import pytest

from cpt_jax.data.sources import Corpus
from cpt_jax.models.families.composite import auto_class
from cpt_jax.recipe.card import model_card
from cpt_jax.recipe.recipe import Context, Domain, Export, Recipe

RECIPE = Recipe(
    name="run", base="", domains=(Domain(corpus=Corpus(name="zh", spec="zh.jsonl"), role="new"),), stages=()
)


@pytest.mark.parametrize(
    ("base", "called", "hub_id"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("HuggingFaceTB/SmolLM2-135M@v1", "HuggingFaceTB/SmolLM2-135M@v1", "HuggingFaceTB/SmolLM2-135M"),
        ("models/llama", "llama", None),
        ("models/llama.gguf", "llama.gguf", None),
        ("runs/first/export", "first", None),
        ("gs://bucket/runs/first/export/", "first", None),
        ("/home/me/models/llama", "llama", None),
        ("./export", "export", None),
    ],
)
def test_a_base_has_the_name_that_others_know_it_by(tmp_path, monkeypatch, base, called, hub_id):
    monkeypatch.chdir(tmp_path)
    Path("models/llama").mkdir(parents=True)
    card = model_card(dataclasses.replace(RECIPE, base=base), Export(), [], {}, None, "AutoModelForCausalLM")
    assert f"\n`{called}`, continued in pre-training on zh" in card
    assert re.findall(r'base_model: "(.*)"', card) == ([] if hub_id is None else [hub_id])


def test_a_longer_context_is_told_and_none_is_not():
    longer = dataclasses.replace(RECIPE, context=Context(length=4096))
    for recipe, told in ((RECIPE, False), (longer, True)):
        card = model_card(recipe, Export(), [], {}, None, "AutoModelForCausalLM")
        assert ("It reads 4,096 tokens, more than the base does (positions stretched by Yarn)." in card) == told
        assert ('"context"' in card) == told


def test_an_adapter_is_loaded_by_the_class_of_its_base():
    for raw, loader in (
        ({"model_type": "llama"}, "AutoModelForCausalLM"),
        ({"model_type": "gemma3"}, "AutoModelForImageTextToText"),
    ):
        card = model_card(RECIPE, Export(adapter=True), [], {}, None, auto_class(raw))
        assert f"\nmodel = {loader}.from_pretrained(BASE)\n" in card


def test_figures_of_other_weights_than_the_cards_are_told():
    entry = {"weights": "last", "domain": "zh", "bits_per_byte": 1.0}
    stages = [entry | {"stage": "base"}, entry | {"stage": "lora"}]
    for export, entries, told in (
        (Export(interpolate_base=0.25), stages, True),
        (Export(interpolate_base=0.25), [*stages, entry | {"stage": "export"}], False),
        (Export(weights="ema"), stages, False),
    ):
        card = model_card(RECIPE, export, entries, {}, None, "AutoModelForCausalLM")
        assert ("with 0.25 of the base in them, were not evaluated" in card) == told
