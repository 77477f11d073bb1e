"""A run whose stage is stopped by its watch, and one whose mixture is changed while it is under way."""

import dataclasses
import json

import pytest
from inputs import chinese, english, write_jsonl

from cpt_jax.adapt import Full
from cpt_jax.core.journal import JOURNAL
from cpt_jax.core.precision import Precision
from cpt_jax.core.storage import read_objects
from cpt_jax.data.holdout import Holdout
from cpt_jax.data.loader import Loader
from cpt_jax.data.sources import Corpus
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.recipe.doctor import examine_run
from cpt_jax.recipe.recipe import Domain, Evaluation, Export, Ramp, Recipe, Samples, Stage, Stop, Watch
from cpt_jax.recipe.run import run


def recipe(root, model, **changes) -> Recipe:
    held = Holdout(share=0.2, max_bytes=4000)
    zh, en = write_jsonl(root / "zh.jsonl", chinese(150)), write_jsonl(root / "en.jsonl", english(150))
    stage = Stage(
        name="all",
        method=Full(),
        mixture={"zh": 0.75, "en": 0.25},
        tokens=16 * 256,
        batch_size=8,
        sequence_length=32,
        optimizer=AdamW(learning_rate=3e-2),
        ema=EMA(decay=0.9),
    )
    return Recipe(
        name="watched",
        base=str(model),
        domains=(
            Domain(corpus=Corpus(name="zh", spec=str(zh)), role="new", heldout=held),
            Domain(corpus=Corpus(name="en", spec=str(en)), role="replay", heldout=held),
        ),
        stages=(dataclasses.replace(stage, **changes),),
        precision=Precision(compute="float32"),
        evaluation=Evaluation(sequence_length=64),
        samples=Samples(),
        export=Export(weights="ema"),
    )


def metrics(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "stages/1-all/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_stage_that_its_watch_stops_is_finished_evaluated_and_exported(tmp_path, tiny_model):
    # Chinese alone: its bytes become likelier, and English less likely.
    watch = Watch(every=2, max_bytes=1000, budget=Stop(limit=0.01))
    stopped = recipe(tmp_path, tiny_model, mixture={"zh": 1.0}, watch=watch)
    workdir = tmp_path / "run"
    run(stopped, workdir)
    lines = [json.loads(line) for line in (workdir / "stages/1-all/watch.jsonl").read_text().splitlines()]
    last = lines[-1]["step"]
    assert 0 < last < 16
    assert lines[-1]["action"].startswith("stop: en is ")
    assert len(metrics(workdir)) == last
    base = json.loads((workdir / "evaluations/watch-base-all.json").read_text())
    # Without a grown vocabulary the stage begins with the base.
    assert lines[0]["bits_per_byte"]["en"] == pytest.approx(base["en"], rel=1e-5)
    assert lines[-1]["average"]["en"] > base["en"]
    stages = {(entry["stage"], entry["weights"]) for entry in json.loads((workdir / "eval.json").read_text())}
    assert ("all", "ema") in stages
    assert (workdir / "export" / "config.json").exists()
    assert "Stage all ended early</b>, after step" in (workdir / "report.html").read_text()
    assert "What it forgot on the way" in (workdir / "report.html").read_text()
    assert examine_run(workdir)
    before = (workdir / "stages/1-all/metrics.jsonl").stat().st_mtime_ns
    run(stopped, workdir)
    assert (workdir / "stages/1-all/metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
def test_another_mixture_goes_on_from_the_checkpoint_and_one_given_too_late_begins_anew(
    tmp_path, tiny_model, monkeypatch
):
    class Killed(Exception):
        pass

    first, workdir = recipe(tmp_path, tiny_model, checkpoint_seconds=0.0), tmp_path / "run"
    following, drawn = Loader.__next__, []

    def dying(self):
        drawn.append(1)
        if len(drawn) > 6:
            raise Killed
        return following(self)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Loader, "__next__", dying)
        run(first, workdir, only="train")
    begun = metrics(workdir)
    ramp = Ramp(start={"zh": 0.5, "en": 0.5}, end={"zh": 0.9, "en": 0.1})
    changed = dataclasses.replace(first, stages=(dataclasses.replace(first.stages[0], mixture=ramp),))
    run(changed, workdir, only="train", update=True)
    lines, events = metrics(workdir), read_objects(workdir / JOURNAL)
    assert [line["loss"] for line in lines[:4]] == [line["loss"] for line in begun[:4]]
    assert len(lines) == 16
    assert [event["station"] for event in events if event["event"] == "changed"] == ["stage-all"]
    assert [event["first"] > 1 for event in events if event["event"] == "training"] == [False, True]
    # It is done: what it learnt from another mixture would be another model.
    run(first, workdir, only="train", update=True)
    events = read_objects(workdir / JOURNAL)
    assert [event["first"] > 1 for event in events if event["event"] == "training"] == [False, True, False]
