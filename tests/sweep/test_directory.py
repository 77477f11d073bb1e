"""What a sweep's directory takes for done."""

import json
import subprocess
from pathlib import Path

import pytest
from inputs import english, write_jsonl

from cpt_jax.core.storage import write_json_atomic
from cpt_jax.data.cleaning import Cleaning
from cpt_jax.data.sources import Corpus
from cpt_jax.recipe.recipe import Domain, Recipe, Vocabulary
from cpt_jax.sweep import at_once, groups
from cpt_jax.sweep import directory as module
from cpt_jax.sweep import sweep as sweeping
from cpt_jax.sweep.directory import SweepDirectory
from cpt_jax.sweep.sweep import Manner
from cpt_jax.vocab.init_rows import Wechsel


@pytest.fixture
def recipes(tmp_path) -> dict[str, Recipe]:
    (tmp_path / "base").mkdir()
    (tmp_path / "named").mkdir()
    for file in ("base/config.json", "named/state.json", "chat.jinja", "zh.vec", "en.vec"):
        (tmp_path / file).write_text("{}")
    for file in ("zh.jsonl", "measured.jsonl"):
        write_jsonl(tmp_path / file, english(3))
    cleaning = Cleaning(evaluation_words=8, evaluation_sets=(str(tmp_path / "measured.jsonl"),))
    zh = Domain(corpus=Corpus(name="zh", spec=str(tmp_path / "zh.jsonl")), role="new", cleaning=cleaning)
    named = Domain(corpus=Corpus(name="named", spec=f"hf:{tmp_path}/named"), role="watch")
    rows = Wechsel(source=str(tmp_path / "en.vec"), target=str(tmp_path / "zh.vec"))
    recipe = Recipe(
        name="a",
        base=str(tmp_path / "base"),
        domains=(zh, named),
        stages=(),
        vocabulary=Vocabulary(initial_rows=rows),
        chat_template=str(tmp_path / "chat.jinja"),
    )
    return {"a": recipe}


def left(place: Path, recipes: dict[str, Recipe]) -> list[str]:
    with SweepDirectory(place, "e", recipes) as directory:
        return list(directory.left(exports=False))


def ended(directory: SweepDirectory) -> None:
    write_json_atomic(directory.run("a") / "eval.json", [])
    directory.done_now("a", 1.0, exports=False)


READ = ["base/config.json", "zh.jsonl", "measured.jsonl", "named/data.arrow", "chat.jinja", "zh.vec", "en.vec"]


@pytest.mark.parametrize("file", READ)
@pytest.mark.parametrize("while_it_trains", [False, True])
def test_a_run_is_done_again_where_what_it_reads_is_not_what_it_has_read(tmp_path, recipes, file, while_it_trains):
    sweep = tmp_path / "sweep"
    with SweepDirectory(sweep, "e", recipes) as directory:
        directory.begun_now("a")
        if while_it_trains:
            (tmp_path / file).write_text("edited meanwhile")
        ended(directory)
    if not while_it_trains:
        assert left(sweep, recipes) == []
        (tmp_path / file).write_text("edited afterwards")
    assert left(sweep, recipes) == ["a"]


@pytest.mark.parametrize("manner", [Manner(), Manner(at_once=2)], ids=["here", "in a process of its own"])
def test_what_a_run_begins_with_is_noted_before_it_reads(tmp_path, recipes, monkeypatch, manner):
    sweep = tmp_path / "sweep"

    def reads(file: Path) -> None:
        """Brings the run through, which edits a file at its end."""
        done = f"mkdir -p {sweep}/runs/a; echo '[]' > {sweep}/runs/a/eval.json; echo edited >> {file}"
        (tmp_path / "python").write_text(f"#!/bin/sh\n{done}\n")
        (tmp_path / "python").chmod(0o755)
        with SweepDirectory(sweep, "e", recipes) as directory:
            sweeping._bring_through(directory, directory.left(exports=False), manner)
            assert directory.of("a")["status"] == "done"

    def run_group(names: dict[str, Recipe], *_: object, on_done, **__: object) -> None:
        subprocess.run([tmp_path / "python"], check=True)
        for name in names:
            on_done(name)

    monkeypatch.setattr(groups, "run_group", run_group)
    monkeypatch.setattr(at_once.sys, "executable", str(tmp_path / "python"))
    reads(tmp_path / "zh.jsonl")
    assert left(sweep, recipes) == ["a"]
    reads(tmp_path / "something else")
    assert left(sweep, recipes) == []


def test_a_job_that_read_what_was_edited_since_is_submitted_again(tmp_path, recipes):
    with SweepDirectory(tmp_path / "sweep", "e", recipes) as directory:
        directory.begun_now("a")
        directory.record("a", status="queued", job="1")
        write_json_atomic(directory.run("a") / "config.json", module.to_json(recipes["a"]))
        write_json_atomic(directory.run("a") / module.MARKS / "evaluate-extended-last.json", {"done": True})
        (tmp_path / "zh.jsonl").write_text("edited while it waited")
        assert not directory.settle("a", exports=False)
        directory.begun_now("a")
        assert directory.settle("a", exports=False)


def test_begun_again_with_other_inputs_a_run_is_not_done_any_more(tmp_path, recipes):
    """Where a sweep is killed at a run that is done again for its export."""
    with SweepDirectory(tmp_path / "sweep", "e", recipes) as directory:
        directory.begun_now("a")
        ended(directory)
        (tmp_path / "zh.jsonl").write_text("edited")
        directory.begun_now("a")
    assert left(tmp_path / "sweep", recipes) == ["a"]


def test_what_another_sweep_did_before_this_one_had_the_lock_is_kept(tmp_path, recipes, monkeypatch):
    sweep, locks = tmp_path / "sweep", module.fcntl.flock
    with SweepDirectory(sweep, "e", recipes):
        pass

    def locked_after_another(file: object, how: int) -> None:
        monkeypatch.setattr(module.fcntl, "flock", locks)
        content = json.loads((sweep / "sweep.json").read_text())
        content["runs"][0]["status"] = "done"
        write_json_atomic(sweep / "sweep.json", content)
        locks(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(module.fcntl, "flock", locked_after_another)
    with SweepDirectory(sweep, "e", recipes) as directory:
        assert directory.of("a")["status"] == "done"
    assert json.loads((sweep / "sweep.json").read_text())["runs"][0]["status"] == "done"
