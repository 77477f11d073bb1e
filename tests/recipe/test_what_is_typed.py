"""Values that cannot be run with are told before anything is computed, with what to give instead."""

import dataclasses
import inspect
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from inputs import chinese, english, hf_config, random_weights, tiny_config, write_jsonl, write_sentencepiece
from safetensors.numpy import load_file, save_file

from cpt_jax.adapt import POSITIONS, Context, Full, Theta
from cpt_jax.checkpoint.hf_write import save
from cpt_jax.cli import main
from cpt_jax.cli.parser import ROPES, parser
from cpt_jax.core.errors import UserError
from cpt_jax.data.holdout import Holdout
from cpt_jax.data.sources import Corpus
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.recipe.copies import link_directory
from cpt_jax.recipe.defaults import CALMER_ROWS_STEP, OLD_ROWS_STEP, _optimizer, adapt_recipe, explain
from cpt_jax.recipe.find import find_recipe, model_named
from cpt_jax.recipe.generate_command import read_prompts
from cpt_jax.recipe.recipe import Domain, Evaluation, Export, Recipe, Samples, Stage
from cpt_jax.recipe.run import Pipeline, export_run
from cpt_jax.recipe.stations import Workdir
from cpt_jax.vocab.init_rows import ROWS_STEP
from cpt_jax.vocab.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("made", "values", "message"),
    [
        (Evaluation, {"sequence_length": 0}, "evaluation.sequence_length is 0: give a number of at least 1"),
        (Evaluation, {"batch_size": -3}, "evaluation.batch_size is -3: give a number of at least 1"),
        (Samples, {"new_tokens": 0}, "samples.new_tokens is 0: give at least 1"),
        (Export, {"shard_gb": math.nan}, "shard_gb is nan: give more than 0"),
        (Export, {"shard_gb": math.inf}, "shard_gb is inf: give more than 0"),
    ],
)
def test_a_value_is_told_where_it_is_made(made, values, message):
    with pytest.raises(UserError, match=message):
        made(**values)


@pytest.fixture
def recipe(tmp_path, tiny_model):
    (tmp_path / "zh.txt").write_text("text")
    stage = Stage(
        name="full", method=Full(), mixture={"zh": 1.0}, tokens=64, batch_size=1, sequence_length=64,
        optimizer=AdamW(learning_rate=1e-3),
    )  # fmt: skip
    domain = Domain(corpus=Corpus(name="zh", spec=str(tmp_path / "zh.txt")), role="new")
    evaluation = Evaluation(sequence_length=64)
    return Recipe(name="typed", base=str(tiny_model), domains=(domain,), stages=(stage,), evaluation=evaluation)


@pytest.mark.parametrize("seed", [-1, 2**32 - 1])
def test_a_seed_has_32_bits(recipe, seed):
    with pytest.raises(UserError, match=f"seed is {seed}: give 0 to"):
        dataclasses.replace(recipe, seed=seed)


def test_samples_that_are_longer_than_the_model_reads_are_told_before_training(recipe, tmp_path):
    long = dataclasses.replace(recipe, samples=Samples(prompts=("the city",), new_tokens=256))
    with (
        Workdir(tmp_path / "run", long) as claimed,
        pytest.raises(UserError, match="do not fit in the model's context"),
    ):
        Pipeline(long, claimed).resolve()


def test_what_is_no_recipe_is_told_with_the_way_to_it(tiny_model, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (tmp_path / "eval.json").write_text(json.dumps([{"stage": "base"}] * 100))
    with pytest.raises(UserError, match=r"run is a directory: give its recipe, .*run/config.json, and --workdir"):
        find_recipe(str(run))
    with pytest.raises(UserError, match=r"as in my.recipes:FUNCTION"):
        find_recipe("my/recipes.py")
    for file in (tiny_model / "config.json", tmp_path / "eval.json"):
        with pytest.raises(UserError, match=r"holds no recipe .*: give the config.json of a run's directory"):
            find_recipe(str(file))
    with pytest.raises(UserError, match="holds no recipe"):
        export_run(tiny_model, tmp_path / "out", {})


def test_a_prompt_may_hold_any_separator_but_the_line_s(tmp_path):
    prompts = ["one\u2028two", "form\x0cfeed", "next\x85line"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("\r\n".join(prompts), encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.jsonl") == prompts
    assert read_prompts(tmp_path / "prompts.txt") == prompts


def test_a_run_as_a_base_of_cpt_adapt_is_its_export(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"name": "run", "stages": []}))
    with pytest.raises(UserError, match="is a run without an export"):
        model_named(str(tmp_path))
    (tmp_path / "export").symlink_to(tiny_model)
    texts = tmp_path / "zh.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in chinese(40)))
    words = ["adapt", "--base", str(tmp_path), "--new", f"zh={texts}", "--workdir", str(tmp_path / "new")]
    arguments, _ = parser().parse_known_args([*words, "--tokens", "1000"])
    recipe, _ = adapt_recipe(**adapting(arguments))
    assert recipe.base == str(tmp_path / "export")


def adapting(arguments) -> dict:
    """What `cpt adapt` gives to its recipe."""
    names = inspect.signature(adapt_recipe).parameters.keys() - {"overrides", "fit"}
    return {name: getattr(arguments, name) for name in names} | {"workdir": Path(arguments.workdir)}


def test_a_base_that_cannot_spell_the_new_text_is_to_grow(tmp_path):
    """Though its tokens for that are few."""
    write_sentencepiece(tmp_path / "tokenizer", english(300), "unigram", 60, byte_fallback=False)
    config = tiny_config(vocab_size=Tokenizer(tmp_path / "tokenizer").size)
    save(tmp_path / "base", config, random_weights(config), hf_config(config), tmp_path / "tokenizer")
    write_jsonl(tmp_path / "zh.jsonl", chinese(40))
    words = [
        "adapt",
        "--base",
        str(tmp_path / "base"),
        "--new",
        f"zh={tmp_path}/zh.jsonl",
        "--workdir",
        f"{tmp_path}/run",
    ]
    arguments, _ = parser().parse_known_args([*words, "--tokens", "1000"])
    recipe, reasons = adapt_recipe(**adapting(arguments))
    assert recipe.vocabulary.extension.new_tokens == 2000
    assert re.match(
        r"2,000: of the tokens that the .* makes of the new text 50.0% stand for what it cannot", reasons["new pieces"]
    )
    missing, _ = parser().parse_known_args([*words, "--chat-template", "nosuch.jinja"])
    with pytest.raises(UserError, match=r"chat template nosuch\.jinja cannot be read"):
        adapt_recipe(**adapting(missing))


@pytest.mark.parametrize(("workdir", "name"), [("..", "adapt"), ("run", "run"), ("n" * 201, "adapt")])
def test_a_recipe_is_called_by_its_directory_where_that_has_a_name(tiny_model, tmp_path, monkeypatch, workdir, name):
    write_jsonl(tmp_path / "zh.jsonl", chinese(40))
    (tmp_path / "within").mkdir()
    monkeypatch.chdir(tmp_path / "within")
    words = ["adapt", "--base", str(tiny_model), "--new", "zh=../zh.jsonl", "--workdir", workdir, "--tokens", "1000"]
    arguments, _ = parser().parse_known_args(words)
    assert adapt_recipe(**adapting(arguments))[0].name == name


def test_corpora_of_cpt_adapt_may_have_their_texts_in_different_fields(tiny_model, tmp_path):
    (tmp_path / "zh.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in chinese(40)))
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chinese(40)))
    new = [f"{name}={tmp_path}/{name}.jsonl" for name in ("more", "zh")]
    words = ["adapt", "--base", str(tiny_model), "--new", *new, "--workdir", str(tmp_path / "run"), "--tokens", "1000"]
    arguments, overrides = parser().parse_known_args([*words, "--domains.1.corpus.text_field", "content"])
    with pytest.raises(UserError, match="its records have content; name the one with text"):
        adapt_recipe(**adapting(arguments))
    recipe, reasons = adapt_recipe(
        **adapting(arguments), overrides=[*overrides, "--stages.1.batch_size", "3", "--stages.1.sequence_length", "50"]
    )
    told = explain(recipe, reasons)
    assert ": 3 rows of 50 a step" in told
    assert "of the new domains each has as many, whatever its size" in told
    assert "tokens: more 50% zh 50%" in told
    assert [domain.corpus.text_field for domain in recipe.domains] == ["text", "content"]
    # What is wrong with a flag is told before a text is read.
    (tmp_path / "zh.jsonl").unlink()
    with pytest.raises(UserError, match="override --seed lacks its value"):
        adapt_recipe(**adapting(arguments), overrides=["--seed"])


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        ("bfloat16", "bfloat16"),
        ("float16", "float16: this GPU has no bfloat16"),
        ("float32", "float32: this CPU has no instructions for bfloat16"),
    ],
)
def test_products_are_of_the_fastest_type(tiny_model, tmp_path, monkeypatch, compute, reason):
    monkeypatch.setattr("cpt_jax.recipe.defaults.fastest_type", lambda: compute)
    (tmp_path / "zh.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chinese(40)))
    words = ["adapt", "--base", str(tiny_model), "--new", f"zh={tmp_path}/zh.jsonl", "--workdir", str(tmp_path / "run")]
    arguments, _ = parser().parse_known_args([*words, "--tokens", "1000"])
    recipe, reasons = adapt_recipe(**adapting(arguments))
    assert recipe.precision.compute == compute
    assert reasons["precision"] == reason
    recipe, _ = adapt_recipe(**adapting(arguments), overrides=["--precision.compute", "bfloat16"])
    assert recipe.precision.compute == "bfloat16"


def test_a_longer_context_brings_rows_of_that_length(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "zh.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chinese(40)))
    words = ["adapt", "--base", str(tiny_model), "--new", f"zh={tmp_path}/zh.jsonl", "--workdir", str(tmp_path / "run")]
    arguments, _ = parser().parse_known_args([*words, "--tokens", "1000", "--context", "1024"])
    recipe, reasons = adapt_recipe(**adapting(arguments))
    assert recipe.context == Context(length=1024)
    assert recipe.evaluation == Evaluation(sequence_length=1024, batch_size=1)
    assert recipe.domains[0].heldout == Holdout(max_bytes=20_000, max_document_bytes=4096)
    assert {(stage.batch_size, stage.sequence_length) for stage in recipe.stages} == {(1, 1024)}
    assert reasons["context"].startswith("1,024 tokens, 4 times the base's 256: yarn, and rows of that length")
    arguments, overrides = parser().parse_known_args(
        [*words, "--context", "1024", "--rope", "theta", "--context.rope.theta", "5e5"]
    )
    recipe, _ = adapt_recipe(**adapting(arguments), overrides=overrides)
    assert recipe.context == Context(length=1024, rope=Theta(theta=5e5))
    assert set(POSITIONS) == set(ROPES)
    monkeypatch.setattr("cpt_jax.recipe.defaults.jax.default_backend", lambda: "gpu")
    recipe, _ = adapt_recipe(**adapting(arguments))
    # Eight devices, of which each has as many tokens as without.
    assert {(stage.batch_size, stage.sequence_length) for stage in recipe.stages} == {(8 * 16, 1024)}
    arguments, _ = parser().parse_known_args([*words, "--tokens", "1000", "--context", "256"])
    with pytest.raises(UserError, match=r"context.length is 256, and the base reads 256 tokens"):
        adapt_recipe(**adapting(arguments))
    arguments, _ = parser().parse_known_args([*words, "--tokens", "1000", "--rope", "theta"])
    with pytest.raises(UserError, match="--rope theta is for a longer context: give --context N"):
        adapt_recipe(**adapting(arguments))


@pytest.mark.parametrize("memory", [None, 10**12, 10**6])
def test_an_accelerator_is_given_steps_that_it_has_room_for(tiny_model, tmp_path, monkeypatch, capsys, memory):
    (tmp_path / "zh.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chinese(40)))
    ran = []
    monkeypatch.setattr("cpt_jax.recipe.run.run", lambda recipe, *_, **__: ran.append(recipe))
    monkeypatch.setattr("cpt_jax.training.memory.accelerator_memory", lambda: memory)
    words = ["adapt", "--base", str(tiny_model), "--new", f"zh={tmp_path}/zh.jsonl", "--workdir", str(tmp_path / "run")]
    main([*words, "--tokens", "1000", "--new-tokens", "10"])
    (recipe,) = ran
    # A step of two rows has no room for them on two devices, whatever is computed again.
    assert [stage.remat is not None for stage in recipe.stages] == [memory == 10**6] * 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  memory")]
    assert len(said) == (memory is not None)
    assert all(("likely too much" in line) == (memory == 10**6) for line in said)


@pytest.mark.parametrize(("size", "rate"), [(1.35e8, 2e-3), (2.7e8, 5e-4), (1.2e9, 5e-4), (8e9, 2e-4)])
def test_adapters_of_larger_models_take_smaller_steps(size, rate):
    assert _optimizer("adamw", "lora", int(size), 1e-3).learning_rate == rate
    assert _optimizer("lion", "dora", int(size), 1e-3).learning_rate == pytest.approx(rate / 5)
    assert _optimizer("adamw", "full", int(size), 1e-3).learning_rate == 5e-5


@pytest.mark.parametrize(("factor", "head"), [(1.0, None), (0.125, None), (1.0, 16.0)])
def test_new_rows_take_steps_by_the_size_of_the_old_ones(tiny_model, tmp_path, factor, head):
    base = tmp_path / "base"
    link_directory(tiny_model, base)
    tensors = load_file(tiny_model / "model.safetensors")
    table = tensors["model.embed_tokens.weight"] * np.float32(factor)
    tensors |= {"model.embed_tokens.weight": table} | (
        {} if head is None else {"lm_head.weight": table * np.float32(head)}
    )
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": head is None}
    for name in ("model.safetensors", "config.json"):
        (base / name).unlink()
    save_file(tensors, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config))
    size = np.median(np.sqrt(np.mean(table.astype(np.float64) ** 2, axis=1))) * np.sqrt(head or 1.0)
    (tmp_path / "zh.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chinese(40)))
    words = ["adapt", "--base", str(base), "--new", f"zh={tmp_path}/zh.jsonl", "--workdir", str(tmp_path / "run")]
    alone, calmer, of_old = (step * size for step in (ROWS_STEP, CALMER_ROWS_STEP, OLD_ROWS_STEP))
    beside = [(method, "10", calmer) for method in ("lora", "expand", "full")]
    for method, given, last in (*beside, ("embeddings", "10", alone), ("embeddings", "0", of_old)):
        arguments, _ = parser().parse_known_args(
            [*words, "--new-tokens", given, "--tokens", "1000", "--method", method]
        )
        recipe, reasons = adapt_recipe(**adapting(arguments))
        optimizers = [stage.optimizer for stage in recipe.stages]
        rates = [optimizer.learning_rate * optimizer.new_rows_multiplier for optimizer in optimizers]
        assert rates == pytest.approx([alone, last][-len(rates) :], rel=0.05)
        assert ("new rows" in reasons) == (given == "10")
        assert getattr(recipe.stages[-1].method, "new_rows", True)
    # Another base is looked at anew.
    words[2] = str(tiny_model)
    arguments, _ = parser().parse_known_args([*words, "--new-tokens", "10", "--tokens", "1000"])
    recipe, _ = adapt_recipe(**adapting(arguments))
    assert recipe.stages[0].optimizer.learning_rate == pytest.approx(alone / factor / np.sqrt(head or 1.0), rel=0.05)
