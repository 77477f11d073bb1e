"""The whole way on a tiny model: from text files to a model that transformers loads; killed and continued; and what
is refused."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import call, cpt, environment, go
from inputs import chinese, english, write_jsonl
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow
RECIPE = """
import dataclasses
from pathlib import Path
from cpt_jax.adapt import Embeddings, LoRA
from cpt_jax.core.precision import Precision
from cpt_jax.data.holdout import Holdout
from cpt_jax.data.sources import Corpus
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.recipe.recipe import *
from cpt_jax.vocab.extend import ContinuedBPE
from cpt_jax.vocab.gate import Limits

SHAPE = dict(batch_size=4, sequence_length=64)

def tiny() -> Recipe:
    held = Holdout(share=0.2, max_bytes=4000)
    return Recipe(
        name="tiny",
        base={base!r},
        domains=(
            Domain(corpus=Corpus(name="zh", spec="zh.jsonl"), role="new", heldout=held),
            Domain(corpus=Corpus(name="en", spec="en.jsonl"), role="replay", heldout=held),
            Domain(corpus=Corpus(name="code", spec="code.txt"), role="watch", heldout=Holdout(share=1.0)),
        ),
        vocabulary=Vocabulary(extension=ContinuedBPE(new_tokens=40), limits=Limits(unreachable_pieces=1.0)),
        stages=(
            Stage(name="rows", method=Embeddings(), mixture={{"zh": 1.0}}, tokens=30 * 256,
            optimizer=AdamW(learning_rate=1e-2), **SHAPE), Stage(name="lora", method=LoRA(rank=4, alpha=8),
            mixture={{"zh": 0.75, "en": 0.25}}, tokens=60 * 256,
                  optimizer=AdamW(learning_rate=1e-2), ema=EMA(decay=0.9), checkpoint_seconds=0.2, **SHAPE),
        ),
        evaluation=Evaluation(sequence_length=128),
        samples=Samples(prompts=("国务院", "the city <b>"), new_tokens=8),
    )

def again() -> Recipe:
    first = tiny()
    lora = dataclasses.replace(first.stages[1], name="again", tokens=20 * 256, ema=None)
    return dataclasses.replace(
        first, name="again", base="run/export", vocabulary=None, stages=(lora,), export=Export(interpolate_base=0.25)
    )

def no_recipe(needed) -> Recipe: ...
"""
GENERATION = {"bos_token_id": 0, "eos_token_id": [0, 1], "temperature": 0.7, "do_sample": True}


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    write_jsonl(root / "zh.jsonl", chinese(400))
    write_jsonl(root / "en.jsonl", english(300))
    (root / "code.txt").write_text("\n\n".join(f"def f{i}(x):\n    return x + {i}" for i in range(40)))
    shutil.copytree(tiny_model, root / "base")
    (root / "base" / "generation_config.json").write_text(json.dumps(GENERATION))
    (root / "recipes.py").write_text(RECIPE.format(base=str(root / "base")))
    return root


@pytest.fixture(scope="module")
def finished(place):
    done = cpt("run", "recipes:tiny", "--workdir", "run", cwd=place)
    return place / "run", done


def test_a_run_leaves_what_the_contract_says(finished):
    run, done = finished
    for name in (
        "config.json",
        "tokenizer/tokenizer.json",
        "base/model.safetensors",
        "data/zh/manifest.json",
        "samples.md",
        "report.html",
    ):
        assert (run / name).exists(), name
    entries = json.loads((run / "eval.json").read_text())
    seen = [(entry["stage"], entry["weights"]) for entry in entries]
    expected = [("base", "last"), ("extended", "last"), ("rows", "last"), ("lora", "last"), ("lora", "ema")]
    assert list(dict.fromkeys(seen)) == expected
    assert len(entries) == 15
    values = {(entry["stage"], entry["weights"], entry["domain"]): entry["bits_per_byte"] for entry in entries}
    assert values["lora", "last", "zh"] < 0.5 * values["base", "last", "zh"]
    lines = [json.loads(line) for line in (run / "stages" / "2-lora" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert "bits per byte" in done.stdout
    assert "report.html" in done.stdout
    assert "left" in done.stderr
    assert "PyTorch" not in done.stderr, "it is not installed, and not needed"
    page = (run / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "").replace("https://", "http://")
    assert "&lt;b&gt;" in page
    assert not list(run.rglob("*.partial"))


def test_the_export_is_the_trained_model(finished, tiny_model, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cpt_jax.core.config import from_json
    from cpt_jax.core.precision import FLOAT32, Precision
    from cpt_jax.models.generate import generate
    from cpt_jax.recipe.export import text_logits
    from cpt_jax.recipe.model import load_model
    from cpt_jax.recipe.recipe import Recipe
    from cpt_jax.recipe.run import Pipeline
    from cpt_jax.recipe.stations import Workdir

    run, _ = finished
    tokenizer, model = (
        AutoTokenizer.from_pretrained(run / "export"),
        AutoModelForCausalLM.from_pretrained(run / "export"),
    )
    ids = tokenizer("国务院应当 the city", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(text_logits(load_model(run / "export"), [ids], FLOAT32)[0] - expected).max() < 1e-4
    recipe = from_json(Recipe, json.loads((run / "config.json").read_text()))
    monkeypatch.chdir(run.parent)
    with Workdir(run, recipe) as claimed:
        pipeline = Pipeline(recipe, claimed)
        pipeline.resolve()
        trained = pipeline.lineage.after("lora", "last")
    assert np.abs(text_logits(trained, [ids], FLOAT32)[0] - expected).max() < 1e-4
    produced = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None)[0, len(ids) :]
    weights = trained.on_device(Precision(compute="float32"))
    assert generate(trained.network, weights, [ids], new_tokens=20) == [produced.tolist()]
    table = load_file(run / "export" / "model.safetensors")["model.embed_tokens.weight"]
    base = load_file(tiny_model / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(table[: len(base)], base)
    assert len(table) == len(tokenizer) == len(base) + 40
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(run / "export" / "model.safetensors")


def test_an_export_of_another_kind_is_checked_and_described(finished, place, tiny_model, monkeypatch, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(place)
    low = ["--out", "low", "--weights", "ema", "--dtype", "bfloat16", "--shard-gb", 3e-5]
    status, _, errors = call(capsys, "export", "--run", "run", *low)
    assert status == 0, errors
    model = AutoModelForCausalLM.from_pretrained(place / "low", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert len(list((place / "low").glob("model-*-of-*.safetensors"))) > 1
    card = (place / "low" / "README.md").read_text()
    assert 'library_name: "transformers"' in card
    assert "moving average" in card
    entries = json.loads((place / "run" / "eval.json").read_text())
    for entry in entries:
        assert f"{entry['bits_per_byte']:.3f}" in card
    for export in ("low", "run/export", "run/base"):
        assert json.loads((place / export / "generation_config.json").read_text()) == GENERATION

    status, _, errors = call(capsys, "export", "--run", "run", "--out", "mixed", "--interpolate-base", 0.3)
    assert status == 0, errors
    mixed, trained, base = (
        load_file(place / name / "model.safetensors") for name in ("mixed", "run/export", "run/base")
    )
    old = len(load_file(tiny_model / "model.safetensors")["model.embed_tokens.weight"])
    for name, tensor in mixed.items():
        expected = 0.7 * trained[name] + 0.3 * base[name]
        if name == "model.embed_tokens.weight":
            np.testing.assert_array_equal(tensor[old:], trained[name][old:])
            tensor, expected = tensor[:old], expected[:old]
        np.testing.assert_allclose(tensor, expected, atol=1e-6, err_msg=name)
    status, _, errors = call(capsys, "export", "--run", "run", "--out", "mixed")
    assert status == 2
    assert "mixed exists" in errors


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_is_what_was_trained_and_a_model_to_go_on_with(finished, place, monkeypatch, capsys):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(place)
    status, _, errors = call(capsys, "export", "--run", "run", "--out", "adapter", "--adapter")
    assert status == 0, errors
    sizes = {
        name: (place / name).stat().st_size
        for name in ("adapter/adapter_model.safetensors", "run/export/model.safetensors")
    }
    assert sizes["adapter/adapter_model.safetensors"] < 0.5 * sizes["run/export/model.safetensors"]
    base = AutoModelForCausalLM.from_pretrained(place / "run" / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, place / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(place / "run" / "export")
    tokens = torch.tensor([[5, 320, 340, 359, 7, 100]])
    with torch.no_grad():
        np.testing.assert_allclose(adapted(tokens).logits, merged(tokens).logits, atol=1e-4)
    spec = ["--data", "zh=run/data/zh/heldout.jsonl"]
    status, _, errors = call(
        capsys, "eval", "--model", "adapter", "--against", "run/export", *spec, "--json", "same.json"
    )
    assert status == 0, errors
    figures = [result["bits_per_byte"] for result in json.loads((place / "same.json").read_text())["results"]]
    np.testing.assert_allclose(figures[0], figures[1], rtol=1e-5)


def test_an_export_is_a_base_to_continue_from(finished, place):
    """Extended, tied, trained, exported; then the export is another recipe's base, and that one's export is exact too."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cpt("run", "recipes:again", "--workdir", "second", cwd=place)
    first, second = (load_file(place / run / "export" / "model.safetensors") for run in ("run", "second"))
    assert first.keys() == second.keys()
    np.testing.assert_array_equal(first["model.embed_tokens.weight"], second["model.embed_tokens.weight"])
    assert (first["model.layers.0.mlp.up_proj.weight"] != second["model.layers.0.mlp.up_proj.weight"]).any()
    stages = [entry["stage"] for entry in json.loads((place / "second" / "eval.json").read_text())]
    assert list(dict.fromkeys(stages)) == ["base", "again", "export"]
    tokenizer = AutoTokenizer.from_pretrained(place / "second" / "export")
    model = AutoModelForCausalLM.from_pretrained(place / "second" / "export")
    ids = tokenizer("国务院应当", add_special_tokens=False)["input_ids"]
    produced = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None)[0].tolist()
    assert sum(index >= len(tokenizer) - 40 for index in produced[len(ids) :]) > 5, "new pieces are produced"


def test_a_second_call_computes_nothing(finished, place):
    run, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (run / "export").iterdir()}
    started = time.monotonic()
    done = cpt("run", "recipes:tiny", "--workdir", "run", cwd=place)
    assert time.monotonic() - started < 30
    assert "stage" not in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (run / "export").iterdir()}


def test_killed_anywhere_it_ends_with_the_same_figures(finished, place):
    run, _ = finished
    killed = place / "killed"
    command = [sys.executable, "-m", "cpt_jax", "run", "recipes:tiny", "--workdir", str(killed)]
    watched = ["tokenizer", "stages/1-rows/metrics.jsonl", "stages/2-lora/metrics.jsonl", "export.unchecked"]
    for name in watched:
        process = subprocess.Popen(
            command, cwd=place, env=environment(place), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while not (killed / name).exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    cpt("run", "recipes:tiny", "--workdir", killed, cwd=place)
    assert (killed / "eval.json").read_text() == (run / "eval.json").read_text()


REFUSED = {
    "unknown recipe": (["run", "recipes:tinny"], "did you mean 'tiny'"),
    "unknown module": (["run", "nowhere:tiny"], "no module 'nowhere'"),
    "unknown override": (
        ["run", "recipes:tiny", "--stages.0.tokenz", "3", "--workdir", "new"],
        "did you mean 'tokens'",
    ),
    "other recipe": (
        ["run", "recipes:tiny", "--seed", "5", "--workdir", "run"],
        "seed: 0 in the work directory, 5 given",
    ),
    "work directory in use": (["run", "recipes:tiny", "--workdir", "."], "not empty and holds no run"),
    "missing corpus": (
        ["run", "recipes:tiny", "--domains.0.corpus.spec", "no.jsonl", "--workdir", "new"],
        "no.jsonl: there is no such file",
    ),
    "missing base": (["run", "recipes:tiny", "--base", "no-model", "--workdir", "new"], "'no-model' is neither"),
    "context": (
        ["run", "recipes:tiny", "--stages.0.sequence_length", "999", "--workdir", "new"],
        "longer than the model's context of 256",
    ),
    "report of nothing": (["report", "."], "no run's directory"),
    "mixture": (["run", "recipes:tiny", "--stages.1.mixture.en", "0.5", "--workdir", "new"], "sum to 1.25"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_input_is_one_line_and_exit_2(finished, place, monkeypatch, capsys, arguments, message):
    go(monkeypatch, place)
    status, _, errors = call(capsys, *arguments)
    assert status == 2, errors
    assert message in errors
    assert len([line for line in errors.splitlines() if "error" in line]) == 1
    assert "Traceback" not in errors
