"""A run whose base is made to read longer texts: what its stations leave, and what is done again."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from commands import call
from inputs import chinese, english, write_jsonl

from cpt_jax.adapt import LoRA
from cpt_jax.checkpoint.context import lengthen
from cpt_jax.core.config import fingerprint, from_json, override, to_json
from cpt_jax.core.errors import UserError
from cpt_jax.core.journal import JOURNAL
from cpt_jax.core.precision import Precision
from cpt_jax.core.storage import read_objects
from cpt_jax.data.holdout import Holdout
from cpt_jax.data.sources import Corpus
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.plan.stage import planned_stages
from cpt_jax.recipe.recipe import Context, Domain, Evaluation, Linear, Recipe, Stage, Theta, Watch, Yarn
from cpt_jax.recipe.run import run
from cpt_jax.recipe.stations import FORMAT
from cpt_jax.report.run_report import write_report

OLD, NEW = 64, 256


@pytest.fixture
def recipe(tmp_path, tiny_model) -> Recipe:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": OLD}))
    named = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(named | {"model_max_length": OLD}))
    zh = write_jsonl(tmp_path / "zh.jsonl", ["".join(chinese(25, seed)) for seed in range(12)])
    en = write_jsonl(tmp_path / "en.jsonl", english(5))
    stage = Stage(
        name="lora", method=LoRA(rank=2, alpha=4), mixture={"zh": 1.0}, tokens=2 * NEW, batch_size=1,
        sequence_length=NEW, optimizer=AdamW(learning_rate=1e-2), watch=Watch(every=1),
    )  # fmt: skip
    held = Holdout(share=0.3, max_bytes=5000, max_document_bytes=5000)
    return Recipe(
        name="longer",
        base=str(base),
        domains=(
            Domain(corpus=Corpus(name="zh", spec=str(zh)), role="new", heldout=held),
            Domain(corpus=Corpus(name="en", spec=str(en)), role="watch", heldout=Holdout(share=1.0, max_bytes=300)),
        ),
        stages=(stage,),
        context=Context(length=NEW),
        precision=Precision(compute="float32"),
        evaluation=Evaluation(sequence_length=NEW, batch_size=1),
    )


def marks(workdir: Path) -> dict[str, str]:
    return {file.stem: json.loads(file.read_text())["fingerprint"] for file in (workdir / ".stations").glob("*.json")}


@pytest.mark.slow
def test_a_run_reads_longer_texts(recipe, tmp_path):
    before = (Path(recipe.base) / "config.json").read_text()
    plain = dataclasses.replace(
        recipe, context=None, stages=(), evaluation=Evaluation(sequence_length=OLD, batch_size=1)
    )
    workdir = tmp_path / "run"
    run(plain, workdir, only="train")
    assert "context" not in json.loads((workdir / "config.json").read_text())
    assert "by_position" not in (workdir / "eval.json").read_text()
    first, measured = marks(workdir), json.loads((workdir / "eval.json").read_text())
    assert first["base-model"] == fingerprint({"inputs": ["unchanged", _content(workdir)], "format": FORMAT})
    run(recipe, workdir, update=True)
    assert (Path(recipe.base) / "config.json").read_text() == before, "the base itself is as it was"
    for part in ("base", "export"):
        fields = json.loads((workdir / part / "config.json").read_text())
        assert fields["max_position_embeddings"] == NEW
        assert fields["rope_parameters"]["rope_type"] == fields["rope_scaling"]["rope_type"] == "yarn"
        assert json.loads((workdir / part / "tokenizer_config.json").read_text())["model_max_length"] == NEW
    entries = json.loads((workdir / "eval.json").read_text())
    assert list(dict.fromkeys(entry["stage"] for entry in entries)) == ["base", "extended", "lora"]
    base, extended, _ = (entry for entry in entries if entry["domain"] == "zh")
    for entry in (base, extended):
        parts = entry["by_position"]
        assert [part["start"] for part in parts] == [0, 1024, 2048]
        assert sum(part["bytes"] for part in parts) == entry["bytes"]
        whole = sum(part["bytes"] * part["bits_per_byte"] for part in parts)
        assert whole == pytest.approx(entry["bytes"] * entry["bits_per_byte"], rel=1e-5)
    assert base["bits_per_byte"] != extended["bits_per_byte"]
    # The base reads what it was made for, here and where the watch compares with it.
    plainly = {entry["domain"]: entry["bits_per_byte"] for entry in measured}
    assert base["bits_per_byte"] == pytest.approx(plainly["zh"], rel=1e-6)
    watched = json.loads((workdir / "evaluations" / "watch-base-lora.json").read_text())
    assert watched["en"] == pytest.approx(plainly["en"], rel=1e-6)
    assert "It reads 256 tokens, more than the base does" in (workdir / "export" / "README.md").read_text()
    page = write_report(workdir).read_text()
    assert "By position" in page
    assert "1k to 2k" in page
    changed = {name for name, mark in marks(workdir).items() if first.get(name, mark) != mark}
    assert changed == {"tokenizer", "base-model", "evaluate-base-last"}
    other = dataclasses.replace(recipe, context=Context(length=NEW, rope=Theta()), stages=())
    started = len(read_objects(workdir / JOURNAL))
    run(recipe, workdir)
    assert not [each for each in read_objects(workdir / JOURNAL)[started:] if each["event"] == "begin"]
    started = len(read_objects(workdir / JOURNAL))
    run(other, workdir, update=True, only="train")
    begun = {each["station"] for each in read_objects(workdir / JOURNAL)[started:] if each["event"] == "begin"}
    assert {"base-model", "evaluate-extended-last"} <= begun
    assert not {"data-zh", "hold-out-zh", "evaluate-base-last"} & begun


def _content(workdir: Path) -> str:
    return fingerprint(json.loads((workdir / ".base.json").read_text())["content"])


def test_two_models_are_compared_by_position_in_rows_of_their_own(recipe, tmp_path, capsys):
    shutil.copytree(recipe.base, tmp_path / "longer")
    lengthen(tmp_path / "longer", Context(length=NEW, rope=Theta(theta=1e4)))
    texts = write_jsonl(tmp_path / "long.jsonl", ["".join(chinese(12))])
    both = ("eval", "--model", tmp_path / "longer", "--against", recipe.base, "--data", f"zh={texts}")
    status, told, _ = call(capsys, *both, "--by-position", "--json", tmp_path / "out.json")
    assert status == 0
    assert "zh, by position" in told
    assert "1k to 2k" in told
    base, longer = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [part["start"] for part in base["by_position"]] == [0, 1024]
    # The same weights and rotation: what the longer rows see more is all that differs.
    assert base["bits_per_byte"] != longer["bits_per_byte"]
    status, _, error = call(capsys, "eval", "--model", recipe.base, "--choices", "q=q.jsonl", "--by-position")
    assert status != 0
    assert "--by-position is of text: give --data NAME=SPEC" in error


def test_what_cannot_be_is_told_before_anything_is_computed(recipe, tmp_path):
    short = dataclasses.replace(recipe, context=Context(length=NEW // 2))
    with pytest.raises(UserError, match="sequence_length 256 is longer than the model's context of 128"):
        run(short, tmp_path / "short")
    with pytest.raises(UserError, match=r"of 64: lower it .* or give the recipe a longer context"):
        run(dataclasses.replace(recipe, context=None), tmp_path / "none")
    with pytest.raises(UserError, match=r"context.length is 64, and the base reads 64 tokens: give more"):
        run(dataclasses.replace(recipe, context=Context(length=OLD)), tmp_path / "same")


def test_it_is_written_and_changed_as_other_settings(recipe):
    for rope in (Yarn(), Theta(), Theta(theta=3e5), Linear()):
        given = dataclasses.replace(recipe, context=Context(length=NEW, rope=rope))
        assert from_json(Recipe, json.loads(json.dumps(to_json(given)))) == given
    assert override(recipe, ("context", "null")).context is None
    assert override(recipe, ("context.length", "512")).context == Context(length=512)
    none = dataclasses.replace(recipe, context=None)
    given = override(none, ("context", '{"kind": "Context", "length": 512, "rope": {"kind": "Theta", "theta": 4e5}}'))
    assert given.context == Context(length=512, rope=Theta(theta=4e5))


def test_a_plan_is_of_the_longer_context(recipe):
    hf_config = json.loads((Path(recipe.base) / "config.json").read_text())
    (planned,) = planned_stages(recipe, hf_config)
    assert planned.config.context_length == NEW
