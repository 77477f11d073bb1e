"""A grid of one recipe's runs: their names, what is refused before anything is written, and a sweep that grows."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from commands import call
from inputs import chinese, english, write_jsonl

from cpt_jax.adapt import LoRA
from cpt_jax.core.config import short_names
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.data.holdout import Holdout
from cpt_jax.data.sources import Corpus
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.recipe import grid
from cpt_jax.recipe.find import find_recipe
from cpt_jax.recipe.grid import find_swept, replaying
from cpt_jax.recipe.recipe import Domain, Evaluation, Recipe, Stage, saved_form
from cpt_jax.report.many import find_runs
from cpt_jax.sweep import at_once
from cpt_jax.sweep.directory import SweepDirectory
from cpt_jax.sweep.sweep import Manner

RATE, RECIPE = "stages.0.optimizer.learning_rate", "one/config.json"


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch):
    """A saved recipe, as `cpt adapt` leaves one, and its texts."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "zh.jsonl", chinese(100))
    write_jsonl(tmp_path / "en.jsonl", english(100))
    stage = Stage(
        name="lora",
        method=LoRA(rank=4, alpha=8, new_rows=False),
        mixture={"zh": 0.75, "en": 0.25},
        tokens=4 * 256,
        batch_size=4,
        sequence_length=64,
        optimizer=AdamW(learning_rate=1e-2),
    )
    domains = tuple(
        Domain(corpus=Corpus(name=name, spec=f"{name}.jsonl"), role=role, heldout=Holdout(share=0.2, max_bytes=1000))
        for name, role in (("zh", "new"), ("en", "replay"))
    )
    recipe = Recipe(
        name="one",
        base=str(tiny_model),
        domains=domains,
        stages=(stage,),
        precision=Precision(compute="float32"),
        evaluation=Evaluation(sequence_length=64),
    )
    write_json_atomic(tmp_path / RECIPE, saved_form(recipe))
    return tmp_path


def test_runs_are_named_by_what_varies(place):
    swept = find_swept(RECIPE, [(RATE, "1e-4", "5e-4"), ("seed", "0", "1")], ["--stages.0.tokens", "512"])
    assert swept.experiment == f"{RECIPE} by {RATE}, seed"
    assert swept.name == "one-learning_rate-seed"
    found = {name: (run.stages[0].optimizer.learning_rate, run.seed) for name, run in swept.runs.items()}
    assert found == {
        "learning_rate-1e-4-seed-0": (1e-4, 0),
        "learning_rate-1e-4-seed-1": (1e-4, 1),
        "learning_rate-5e-4-seed-0": (5e-4, 0),
        "learning_rate-5e-4-seed-1": (5e-4, 1),
    }
    assert {run.stages[0].tokens for run in swept.runs.values()} == {512}
    shares = ('{"zh": 1}', '{"zh": 0.95, "en": 0.05}')
    mixed = find_swept(RECIPE, [("stages.0.mixture", *shares)]).runs
    assert [(name, run.stages[0].mixture) for name, run in mixed.items()] == [
        ("mixture-zh-1", {"zh": 1.0}),
        ("mixture-zh-0.95-en-0.05", {"zh": 0.95, "en": 0.05}),
    ]
    shared = find_swept(RECIPE, [("replay-share", "0", "0.05", "0.5")])
    assert (shared.experiment, shared.name) == (f"{RECIPE} by replay_share", "one-replay_share")
    assert [(name, run.stages[0].mixture) for name, run in shared.runs.items()] == [
        ("replay_share-0", {"zh": 1.0}),
        ("replay_share-0.05", {"zh": 0.95, "en": 0.05}),
        ("replay_share-0.5", {"zh": 0.5, "en": 0.5}),
    ]
    held = find_swept(RECIPE, [("stages.0.retention", "[]", '[{"kind": "Anchor", "weight": 0.5}]')]).runs
    assert {name: len(run.stages[0].retention) for name, run in held.items()} == {
        "retention-none": 0,
        "retention-kind-Anchor-weight-0.5": 1,
    }
    assert list(find_swept(RECIPE, [("base", "ORG/a-1B", "../b")]).runs) == ["base-ORG-a-1B", "base-..-b"]
    assert short_names(["stages.0.tokens", "stages.1.tokens", "seed", "domains.0"]) == {
        "stages.0.tokens": "0.tokens",
        "stages.1.tokens": "1.tokens",
        "seed": "seed",
        "domains.0": "domains.0",
    }


WRONG = {
    "no values": (("--vary", "seed"), "--vary seed lacks its values, as in --vary seed 0 1 2"),
    "one run": (("--vary", "seed", "3"), "--vary seed makes one run, seed-3: give more values, or use `cpt run`"),
    "a value twice": (("--vary", RATE, "1e-4", "0.0001"), "learning_rate-1e-4 and learning_rate-0.0001 are the same"),
    "a field twice": (("--vary", "seed", "0", "--vary", "seed", "1"), "--vary seed is given twice"),
    "no such field": (("--vary", RATE.replace("learn", "lern"), "1", "2"), "did you mean 'learning_rate'?"),
    "no number": (("--vary", RATE, "1e-4", "high"), "learning_rate is 'high': give a value of type float"),
    "shares of no whole": (("--vary", "stages.0.mixture", '{"zh": 1}', '{"zh": 0.5}'), "the shares sum to 0.5, not"),
    "varied and given": (("--vary", "seed", "0", "1", "--seed", "3"), "--seed is given for all runs, which differ"),
    "named": (("--vary", "seed", "0", "1", "--name", "x"), "--name is given for all runs, which differ in it"),
    "one name": (("--vary", "base", "a/b", "a-b"), "has 2 runs named 'base-a-b': names must differ"),
    "a long name": (("--vary", "base", "a", "b" * 250), "give one of at most 200 bytes"),
    "no share": (("--vary", "replay-share", "0.1", "1"), "--vary replay-share 1: give shares from 0 up to, not incl"),
    "share of words": (("--vary", "replay-share", "some", "0"), "--vary replay-share some: give shares from 0 up to"),
    "nothing replayed": (
        ("--vary", "replay-share", "0", "0.1", "--stages.0.mixture", '{"zh": 1}'),
        "no stage of this recipe replays: give one a mixture with a replayed domain",
    ),
    "nothing new": (
        ("--vary", "replay-share", "0", "0.1", "--stages.0.mixture", '{"en": 1}'),
        "stage 'lora' mixes nothing new: vary stages.0.mixture",
    ),
    "by size": (
        (
            "--vary",
            "replay-share",
            "0",
            "0.1",
            "--stages.0.mixture",
            '{"kind": "Temperature", "domains": ["zh", "en"]}',
        ),
        "stage 'lora' mixes by a Temperature, without a share of its own: vary stages.0.mixture",
    ),
    "nothing varies": ((), f"{RECIPE} is one recipe: say in what its runs differ, as in --vary seed 0 1 2"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_wrong_grids_are_told_before_anything_is_written(place, capsys, words, message):
    before = sorted(place.rglob("*"))
    status, out, told = call(capsys, "sweep", RECIPE, *words)
    assert (status, out) == (2, "")
    (line,) = told.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert sorted(place.rglob("*")) == before


def test_a_replay_share_leaves_the_rest_in_proportion():
    domains = [Domain(corpus=Corpus(name=name, spec=name), role="new") for name in ("zh", "km")]
    domains += [Domain(corpus=Corpus(name=name, spec=name), role="replay") for name in ("en", "code")]
    stage = find_recipe("quickstart").stages[1]
    new, mixed = {"zh": 0.5, "km": 0.5}, {"en": 0.1, "zh": 0.45, "km": 0.15, "code": 0.3}
    stages = [dataclasses.replace(stage, name=str(n), mixture=each) for n, each in enumerate((new, mixed, mixed))]
    recipe = Recipe(name="many", base="base", domains=tuple(domains), stages=tuple(stages))
    found = [stage.mixture for stage in replaying(recipe, "0.2").stages]
    assert found == [new, *[{"en": 0.05, "zh": 0.6, "km": 0.2, "code": 0.15}] * 2]
    assert [[*stage.mixture] for stage in replaying(recipe, "0").stages] == [["zh", "km"]] * 3
    assert replaying(recipe, "0.4").stages == recipe.stages


def test_a_recipe_by_its_name_is_told_what_it_lacks():
    with pytest.raises(UserError, match="quickstart is one recipe: say in what its runs differ, as in --vary seed 0 1"):
        find_swept("quickstart")


def test_an_experiment_goes_before_a_recipe_of_its_name(place, monkeypatch):
    runs = {"one": find_recipe(RECIPE)}
    monkeypatch.setattr(grid, "find_experiment", lambda name: runs)
    assert find_swept("quickstart").runs == runs


def test_a_process_of_a_run_is_given_its_recipe(place, monkeypatch):
    """Whatever is varied: no value has to come through a queue's script."""
    python = place / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@" >> words.txt\n')
    python.chmod(0o755)
    monkeypatch.setattr(at_once.sys, "executable", str(python))
    shares = ("stages.0.mixture", '{"zh": 1}', '{"zh": 0.9, "en": 0.1}')
    swept = find_swept(RECIPE, [shares, (RATE, "1e-3", "2e-3")])
    with SweepDirectory(Path("swept"), swept.experiment, swept.runs) as directory:
        monkeypatch.setattr(SweepDirectory, "done_now", lambda *_: None)
        at_once.run_at_once(directory, swept.runs, Manner(at_once=1))
    words = (place / "words.txt").read_text().splitlines()
    given = [words[place + 1] for place, word in enumerate(words) if word == "train"]
    assert [find_recipe(recipe) for recipe in given] == list(swept.runs.values())


@pytest.mark.slow
def test_a_grid_goes_on_with_more_values(place, capsys):
    words = ("sweep", RECIPE, "--vary", RATE, "1e-2", "3e-3")
    assert call(capsys, *words, "--workdir", "rates")[0] == 0
    done = place / "rates/runs/learning_rate-1e-2"
    before = {path: os.stat(path).st_mtime_ns for path in done.rglob("*")}
    status, table, told = call(capsys, *words, "2e-2", "--workdir", "rates")
    assert status == 0
    assert "2 of 3 runs are done" in told
    assert {path: os.stat(path).st_mtime_ns for path in done.rglob("*")} == before
    rows = [line.split()[0] for line in table.splitlines() if "learning_rate" in line]
    assert rows == ["learning_rate-1e-2", "learning_rate-3e-3", "learning_rate-2e-2"]
    # The page has them as they were given, not by what numbers their names hold.
    assert [run.name for run in find_runs([place / "rates"])[0]] == rows
    third = find_swept(RECIPE, [(RATE, "2e-2", "1")]).runs["learning_rate-2e-2"]
    assert json.loads((place / f"rates/runs/{third.name}/config.json").read_text()) == json.loads(
        json.dumps(saved_form(third))
    )
    status, _, told = call(capsys, "sweep", RECIPE, "--vary", "seed", "0", "1", "--workdir", "rates")
    assert status == 2
    assert f"belongs to the experiment '{RECIPE} by {RATE}', not '{RECIPE} by seed': choose another" in told


def test_overrides_are_for_all_runs_of_an_experiment(place, monkeypatch):
    (place / "grown.py").write_text(
        "import dataclasses\nfrom cpt_jax.recipe.find import find_recipe\n"
        f"def two():\n    one = find_recipe({RECIPE!r})\n"
        "    return {name: dataclasses.replace(one, seed=seed) for seed, name in enumerate('ab')}\n"
    )
    monkeypatch.syspath_prepend(place)
    runs = find_swept("grown:two", overrides=["--stages.0.tokens", "512"]).runs
    assert [(name, run.name, run.seed, run.stages[0].tokens) for name, run in runs.items()] == [
        ("a", "a", 0, 512),
        ("b", "b", 1, 512),
    ]
