"""What a recipe's domain leaves out of training, by itself and because another domain is measured on it."""

import dataclasses
import json
import shutil

import pytest
from inputs import chinese, english, write_jsonl

from cpt_jax.adapt import Full
from cpt_jax.data.holdout import Holdout, read_heldout
from cpt_jax.data.prepare import read_manifest
from cpt_jax.data.sources import Corpus
from cpt_jax.data.words import words_of
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.recipe.recipe import Cleaning, Domain, Evaluation, Recipe, Stage
from cpt_jax.recipe.run import Pipeline
from cpt_jax.recipe.stations import Workdir


@pytest.fixture
def recipe(tmp_path, tiny_model):
    held = Holdout(share=0.2, max_bytes=4000)
    write_jsonl(tmp_path / "zh.jsonl", [*chinese(150), *chinese(20), "...... !!!"])
    # Half of the other corpus's documents, in other words around them.
    write_jsonl(tmp_path / "en.jsonl", [*english(100), *(f"see {text} above" for text in chinese(150)[:75])])
    cleaning = {"zh": Cleaning(duplicates=True, filters=("symbols",)), "en": Cleaning(evaluation_words=13)}
    domains = tuple(
        Domain(
            corpus=Corpus(name=name, spec=str(tmp_path / f"{name}.jsonl")),
            role=role,
            heldout=held,
            cleaning=cleaning[name],
        )
        for name, role in (("zh", "new"), ("en", "replay"))
    )
    shape = dict(batch_size=8, sequence_length=64, optimizer=AdamW(learning_rate=1e-2))
    stage = Stage(name="full", method=Full(), mixture={"zh": 0.5, "en": 0.5}, tokens=512, **shape)
    return Recipe(
        name="clean", base=str(tiny_model), domains=domains, stages=(stage,), evaluation=Evaluation(sequence_length=128)
    )


def prepared(recipe, workdir):
    with Workdir(workdir, recipe) as claimed:
        pipeline = Pipeline(recipe, claimed)
        pipeline.resolve()
        for domain in recipe.domains:
            pipeline.hold_out(domain)
        pipeline.vocabulary()
        for domain in recipe.domains:
            pipeline.prepare(domain)
        return {domain.name: claimed.was_done(f"data-{domain.name}") for domain in recipe.domains}


def test_a_recipe_says_what_is_left_out(recipe, tmp_path):
    run = tmp_path / "run"
    assert prepared(recipe, run) == {"zh": False, "en": False}
    zh, en = (read_manifest(run / "data" / name) for name in ("zh", "en"))
    assert zh.skipped["duplicate"] > 10
    assert zh.skipped.get("more symbols than letters", 0) + zh.skipped["held out"] > 0
    held = read_heldout(run / "data" / "zh")
    assert held
    assert en.skipped["13 words in a row of what is held out of zh"] >= 5
    left_out = json.loads((run / "data" / "en" / "statistics.json").read_text())["left_out"]
    for _, text in left_out["13 words in a row of what is held out of zh"]:
        words = words_of(text)
        runs = ["".join(words[place : place + 13]) for place in range(len(words) - 12)]
        assert any(run in "".join(words_of(each)) for run in runs for each in held)
    assert prepared(recipe, run) == {"zh": True, "en": True}
    # What is changed of one domain is made again, and only that.
    first, second = recipe.domains
    changed = dataclasses.replace(recipe, domains=(dataclasses.replace(first, cleaning=Cleaning()), second))
    assert prepared(changed, run) == {"zh": False, "en": True}
    assert "duplicate" not in read_manifest(run / "data" / "zh").skipped


def test_conversations_are_written_anew_by_another_template(recipe, tmp_path, tiny_model):
    base, talk, run = tmp_path / "base", tmp_path / "talk.jsonl", tmp_path / "run"
    shutil.copytree(tiny_model, base)
    lines = [{"prompt": text, "completion": text[::-1]} for text in english(60)]
    talk.write_text("".join(json.dumps(line) + "\n" for line in lines))
    zh, en = recipe.domains
    chat = dataclasses.replace(en, corpus=Corpus(name="en", spec=str(talk), format="chat"), cleaning=Cleaning())
    recipe = dataclasses.replace(recipe, base=str(base), domains=(dataclasses.replace(zh, cleaning=Cleaning()), chat))
    template = "{% for m in messages %}ROLE{{ m.role }}: {{ m.content }}<|im_end|>{{ sep_token }}{% endfor %}"
    for role, done in (("", [False, False]), ("", [True, True]), ("the ", [True, False])):
        (base / "chat_template.jinja").write_text(template.replace("ROLE", role))
        assert list(prepared(recipe, run).values()) == done
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"sep_token": " and"}))
    assert prepared(recipe, run) == {"zh": True, "en": False}
