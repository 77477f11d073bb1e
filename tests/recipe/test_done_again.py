"""What of a finished run is done again when one thing is changed, and what is kept."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from inputs import chinese, english, write_jsonl

from cpt_jax.adapt import LoRA
from cpt_jax.core.errors import UserError
from cpt_jax.core.journal import JOURNAL
from cpt_jax.core.precision import Precision
from cpt_jax.core.storage import read_objects
from cpt_jax.data.holdout import Holdout
from cpt_jax.data.sources import Corpus
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.recipe.recipe import Domain, Evaluation, Export, Recipe, Samples, Stage, Vocabulary
from cpt_jax.recipe.run import export_run, run
from cpt_jax.recipe.stations import Workdir
from cpt_jax.vocab.extend import ContinuedBPE
from cpt_jax.vocab.gate import Limits

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model) -> Recipe:
    root, held = tmp_path_factory.mktemp("again"), Holdout(share=0.2, max_bytes=4000)
    zh, en = write_jsonl(root / "zh.jsonl", chinese(150)), write_jsonl(root / "en.jsonl", english(100))
    write_jsonl(root / "other.jsonl", english(40, seed=3))
    shutil.copytree(tiny_model, root / "base")
    shape = dict(batch_size=8, sequence_length=64, optimizer=AdamW(learning_rate=1e-2))
    stage = Stage(name="lora", method=LoRA(rank=4, alpha=8), mixture={"zh": 0.5, "en": 0.5}, tokens=1024, **shape)
    return Recipe(
        name="again",
        base=str(root / "base"),
        domains=(
            Domain(corpus=Corpus(name="zh", spec=str(zh)), role="new", heldout=held),
            Domain(corpus=Corpus(name="en", spec=str(en)), role="replay", heldout=held),
        ),
        vocabulary=Vocabulary(extension=ContinuedBPE(new_tokens=20), limits=Limits(unreachable_pieces=1.0)),
        stages=(stage,),
        precision=Precision(compute="float32"),
        evaluation=Evaluation(sequence_length=128),
        samples=Samples(prompts=("the city",), new_tokens=4),
    )


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    run(recipe, workdir)
    return workdir


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    # With its files' times.
    return Path(shutil.copytree(finished, tmp_path / "run"))


def begun_by(recipe: Recipe, workdir: Path) -> list[str]:
    """The stations that another start begins."""
    before = len(read_objects(workdir / JOURNAL))
    run(recipe, workdir, update=True)
    return [event["station"] for event in read_objects(workdir / JOURNAL)[before:] if event["event"] == "begin"]


@pytest.mark.parametrize("station", ["tokenizer", "stage-lora", "export", "model-card"])
def test_killed_before_it_is_noted_as_done_a_station_is_finished(recipe, copy, station):
    mark = copy / ".stations" / f"{station}.json"
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"done": False}))
    assert station in begun_by(recipe, copy)
    assert (copy / "export" / "model.safetensors").exists()
    assert not list(copy.glob("*.unchecked"))


def test_what_leads_to_the_same_tokenizer_trains_nothing_again(recipe, copy):
    vocabulary = dataclasses.replace(recipe.vocabulary, limits=Limits(unreachable_pieces=0.9))
    other = Corpus(name="other", spec=str(Path(recipe.base).parent / "other.jsonl"))
    watched = Domain(corpus=other, role="watch", heldout=Holdout(share=1.0))
    assert begun_by(dataclasses.replace(recipe, vocabulary=vocabulary), copy) == ["tokenizer", "model-card"]
    begun = begun_by(dataclasses.replace(recipe, domains=(*recipe.domains, watched)), copy)
    assert not {"base-model", "stage-lora", "export"} & {*begun}
    assert {"hold-out-other", "evaluate-lora-last", "model-card"} <= {*begun}
    card = (copy / "export" / "README.md").read_text()
    assert "| other | measured only |" in card
    assert str(Path(recipe.base).parent) not in card, "where local files lie is told to nobody"
    assert '"spec": "other.jsonl"' in card


def test_what_is_no_part_of_the_base_or_of_its_text_changes_nothing(recipe, copy):
    (Path(recipe.base) / "README.md").write_text("# A card that was written later\n")
    (Path(recipe.base) / ".cache").mkdir()
    (Path(recipe.base) / ".cache" / "config.json").write_text("{}")
    assert begun_by(recipe, copy) == []
    files = [Path(domain.corpus.spec) for domain in recipe.domains]
    times = [(file.stat().st_atime_ns, file.stat().st_mtime_ns) for file in files]
    for file in files:
        file.touch()
    begun = begun_by(recipe, copy)
    for file, time in zip(files, times, strict=True):
        os.utime(file, ns=time)
    assert {"tokenizer", "data-zh", "data-en"} <= {*begun}
    assert not {"base-model", "stage-lora", "export"} & {*begun}


def test_the_card_tells_of_the_model_beside_it(recipe, copy):
    of_stages = (copy / "export" / "README.md").read_text().splitlines()
    mixed = dataclasses.replace(recipe, export=Export(interpolate_base=0.5))
    assert begun_by(mixed, copy) == ["export", "evaluate-export-last", "model-card", "samples"]
    card = (copy / "export" / "README.md").read_text()
    value = next(e["bits_per_byte"] for e in json.loads((copy / "eval.json").read_text()) if e["stage"] == "export")
    assert f"| export | {value:.3f} (" in card
    assert "were not evaluated" not in card
    assert next(line for line in of_stages if line.startswith("| lora |")) in card
    # Of an export with another share nothing was measured, which its card says.
    export_run(copy, copy.parent / "quarter", {"interpolate_base": 0.25})
    card = (copy.parent / "quarter" / "README.md").read_text()
    assert "| export |" not in card
    assert "These weights, with 0.25 of the base in them, were not evaluated" in card
    # Another length of evaluation gives other figures, and the same weights.
    shorter = dataclasses.replace(mixed, evaluation=Evaluation(sequence_length=32))
    assert "export" not in begun_by(shorter, copy)
    assert f"| export | {value:.3f} (" not in (copy / "export" / "README.md").read_text()


def test_a_run_that_is_not_finished_is_not_exported(recipe, copy):
    mark = copy / ".stations" / "stage-lora.json"
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"done": False}))
    with pytest.raises(UserError, match=r"stage 'lora' of .* is not finished: run `cpt run"):
        export_run(copy, copy.parent / "out", {})
    assert not (copy.parent / "out").exists()


def test_under_way_a_station_goes_on_with_more_sources_not_with_others(recipe, tmp_path, capsys):
    out = tmp_path / "run" / "out"

    def outputs_kept(sources: dict[str, str]) -> bool:
        """Whether a try, which is killed, finds what the one before it has written."""
        with Workdir(tmp_path / "run", recipe) as workdir:
            workdir.begin("stage", ["fixed"], [out], changeable=sorted(sources), sources=sources)
        kept = out.exists()
        out.write_text("half of it")
        return kept

    assert not outputs_kept({"zh": "1"})
    assert outputs_kept({"zh": "1"})
    assert outputs_kept({"zh": "1", "en": "1"})
    assert not outputs_kept({"zh": "2", "en": "1"})
    assert "stage: made anew" in capsys.readouterr().err
    assert outputs_kept({"zh": "2", "en": "1"})
