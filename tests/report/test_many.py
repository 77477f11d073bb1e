"""Runs side by side: seeds joined, what differs, the front, and the page."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from many_runs import changed_stage, write_run

from cpt_jax.adapt import Full
from cpt_jax.core.config import to_json
from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.data.sources import Corpus
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.recipe.mirror import MARKS
from cpt_jax.recipe.recipe import Domain, Export, Recipe, Stage
from cpt_jax.report import plots
from cpt_jax.report.many import find_runs, read_run
from cpt_jax.report.many_plots import points_plot
from cpt_jax.report.many_report import write_runs_report
from cpt_jax.report.plots import curves_plot, new_figure, saved
from cpt_jax.report.side_by_side import columns_of, pareto_front, settings_of_runs
from cpt_jax.sweep import at_once
from cpt_jax.sweep.directory import SweepDirectory
from cpt_jax.sweep.sweep import Manner, _check_exports, _report, planned


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    for share in (0, 0.01, 0.05, 0.1, 0.25, 0.5):
        for seed in range(2):
            write_run(root / "runs" / f"replay-{share}-{seed}", share, seed, noise=0.002)
    return root


def test_seeds_are_joined_and_the_front_is_found(sweep):
    runs, left_out = find_runs([sweep])
    settings = settings_of_runs(runs)
    assert not left_out
    assert [len(setting.runs) for setting in settings] == [2] * 6
    assert list(columns_of(runs)) == ["replay"]
    front = [setting.runs[0].replay for setting in pareto_front(settings, "zh", "en")]
    assert front == sorted(front)
    assert 0.5 in front


def test_runs_of_a_sweep_are_in_the_order_of_their_numbers(tmp_path):
    for share in (0.0, 0.02, 0.1, 0.25):
        write_run(tmp_path / "runs" / f"replay-{share:.0%}²", share, 0, noise=0.0)
    assert [run.replay for run in find_runs([tmp_path])[0]] == [0.0, 0.02, 0.1, 0.25]


def test_numbers_of_front_points_do_not_lie_on_each_other(tmp_path):
    for share in (0.05, 0.0505, 0.051, 0.25, 0.5):
        write_run(tmp_path / "runs" / f"replay-{share}", share)
    settings = settings_of_runs(find_runs([tmp_path])[0])
    front = pareto_front(settings, "zh", "en")
    svg = points_plot(settings, front, "zh", "en", tmp_path)
    assert len(front) == 5
    assert [number for number in ("1", "2", "3", "1-3", "4", "5") if f">{number}</text>" in svg] == ["1-3", "4", "5"]


def test_runs_that_differ_in_much_are_called_by_their_names(tmp_path):
    write_run(tmp_path / "runs" / "slow", 0.25, rate=1e-4)
    write_run(tmp_path / "runs" / "fast", 0.25, rate=1e-2)
    settings = settings_of_runs(find_runs([tmp_path])[0])
    assert {setting.label for setting in settings} == {"learning_rate 0.0001", "learning_rate 0.01"}
    config = json.loads((tmp_path / "runs" / "slow" / "config.json").read_text())
    prompts = {"prompts": ["国务院有关部门应当" * 12]}
    (tmp_path / "runs" / "slow" / "config.json").write_text(json.dumps(config | {"samples": prompts}))
    settings = settings_of_runs(find_runs([tmp_path])[0])
    assert {setting.label for setting in settings} == {"slow", "fast"}


def test_what_a_run_lacks_whole_is_one_column(tmp_path):
    """Not one for each of its settings, but for those in which the other runs differ."""
    for name, pieces in (("none", None), ("few", 1000), ("many", 2000)):
        write_run(tmp_path / "runs" / name, 0.25)
        path = tmp_path / "runs" / name / "config.json"
        extension = {"kind": "ContinuedBPE", "new_tokens": pieces, "min_frequency": 2}
        vocabulary = {"kind": "Vocabulary", "extension": extension, "drop_unreachable": False}
        changed = {"vocabulary": vocabulary if pieces else None, "base": f"runs/{name}/export"}
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    runs = {run.name: run for run in find_runs([tmp_path])[0]}
    told = {
        name: {run: cell(facts) for run, facts in runs.items()} for name, cell in columns_of([*runs.values()]).items()
    }
    assert told == {
        "base": {"none": "none", "few": "few", "many": "many"},
        "vocabulary": {"none": "none", "few": "Vocabulary", "many": "Vocabulary"},
        "new_tokens": {"none": "none", "few": "1,000", "many": "2,000"},
    }
    assert list(columns_of([runs["none"], runs["few"]])) == ["base", "vocabulary"]


def test_what_only_one_variant_has_gets_no_column(tmp_path):
    full, lora = {"kind": "Full"}, {"kind": "LoRA", "rank": 4, "targets": ["q", "k"], "dora": False}
    methods = {"full": full, "lora": lora, "high": lora | {"rank": 8}}
    for name, method in methods.items():
        write_run(tmp_path / "runs" / name, 0.25)
        changed_stage(tmp_path / "runs" / name, method=method)
    runs, _ = find_runs([tmp_path])
    assert list(columns_of(runs)) == ["method", "rank"]
    assert list(columns_of([run for run in runs if run.name != "high"])) == ["method"]


def test_the_curves_of_a_single_step_can_be_drawn(tmp_path):
    # Warnings are errors: the layout gave up where a name lay outside of the axes.
    line = {"step": 1, "nats/zh": 2.0, "learning_rate": 1e-3}
    assert "lora" in curves_plot({"lora": [line]}, tmp_path)


def test_curves_name_every_domain_and_end_near_their_last_values(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "saved", lambda figure, *_: figures.append(figure))
    falling = [{"step": n, "nats/zh": 10.0 - n, "nats/en": 4.0, "learning_rate": 1e-3} for n in range(1, 9)]
    curves_plot({"both": falling, "one": [{"step": 1, "nats/zh": 2.0, "learning_rate": 1e-3}]}, tmp_path)
    loss = figures[0].axes[0]
    assert sorted(text.get_text() for text in loss.get_legend().get_texts()) == ["en", "zh"]
    (zh,) = (line for line in loss.lines if line.get_label() == "zh")
    assert zh.get_ydata()[-1] < 3.0


def test_a_wide_picture_does_not_shrink_beyond_reading(tmp_path):
    figure, _ = new_figure(2, 10.0, 3.0)
    assert 'style="min-width: 504px"' in saved(figure, tmp_path, "wide").partition(">")[0]


def test_names_with_slashes_and_dollar_signs_can_be_drawn(tmp_path):
    figure, [axis] = new_figure(1, 3.0, 2.0)
    axis.set_title("cost_$5_$10")
    assert "cost_$5_$10" in saved(figure, tmp_path, "law-c4/en")
    assert (tmp_path / "law-c4-en.png").exists()


def test_the_page_holds_the_answer(sweep):
    page = write_runs_report([sweep], sweep / "report.html").read_text()
    assert "With at most 1% more loss on en, replay 1" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (sweep / "plots" / "law-en.png").exists()


def test_what_is_none_of_the_experiment_s_runs_is_left_out_of_its_sweep(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / "runs" / name, 0.25)
    write_json_atomic(tmp_path / "sweep.json", {"experiment": "e", "runs": [{"name": "a", "status": "done"}]})
    runs, left_out = find_runs([tmp_path])
    assert [run.name for run in runs] == ["a"]
    assert left_out == [f"{tmp_path}/runs/b: the sweep's experiment does not have it"]
    page = write_runs_report([tmp_path / "runs" / "a"], tmp_path / "report.html").read_text()
    assert f"<h1>{tmp_path.name}</h1>" in page


def test_runs_that_have_diverged_are_left_out_of_page_and_law(sweep, tmp_path):
    write_run(tmp_path / "a", 0.25)
    entries = json.loads((tmp_path / "a" / "eval.json").read_text())
    write_json_atomic(tmp_path / "a" / "eval.json", [entry | {"bits_per_byte": math.inf} for entry in entries])
    runs, left_out = find_runs([sweep, tmp_path / "a"])
    assert len(runs) == 12
    assert left_out == [f"{tmp_path}/a: it has diverged, its bits per byte are no number"]
    assert left_out[0] in write_runs_report([sweep, tmp_path / "a"], tmp_path / "compare.html").read_text()
    with pytest.raises(UserError, match="it has diverged, its bits per byte are no number: lower"):
        find_runs([tmp_path / "a"])


def test_figures_that_are_no_numbers_come_back_from_sweep_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes = {"a": without_stages("zh")}
    with ended(tmp_path / "sweep", **recipes) as directory:
        directory.record("a", final={"zh": math.nan})
    assert "NaN" not in (tmp_path / "sweep" / "sweep.json").read_text()
    with SweepDirectory(tmp_path / "sweep", directory.experiment, recipes) as found:
        assert "nan (+nan%)" in found.table()


def test_no_run_has_ended(tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="has ended yet"):
        find_runs([tmp_path])


def test_a_dry_run_says_where_each_run_would_go(tmp_path):
    domain = Domain(corpus=Corpus(name="zh", spec="zh.jsonl"), role="new")
    recipe = Recipe(name="a", base="b", domains=(domain,), stages=())
    recipes = {name: dataclasses.replace(recipe, name=name) for name in ("a", "b")}
    directory = SweepDirectory(tmp_path / "sweep", "e", recipes, claim=False)
    for manner, told in (
        (Manner(queue="slurm"), "a job on slurm: "),
        (Manner(at_once=2), "in a process of its own: "),
        (Manner(), "alone: "),
    ):
        assert planned(directory, recipes, manner)[1:] == [f"  {told}a", f"  {told}b"]


def ended(root, **runs):
    """The directory of a sweep whose runs, in this directory, have halved their bits per byte in each stage."""
    directory = SweepDirectory(root, "e", runs)
    for name, recipe in runs.items():
        stages = [
            "base",
            *(stage.name for stage in recipe.stages),
            *(["export"] if recipe.export.interpolate_base else []),
        ]
        entries = [
            {"stage": stage, "weights": "last", "domain": domain.name, "bits_per_byte": 2.0**-number, "bytes": 9}
            for number, stage in enumerate(stages)
            for domain in recipe.domains
        ]
        write_json_atomic(directory.run(name) / "config.json", to_json(recipe))
        write_json_atomic(directory.run(name) / "eval.json", entries)
        for domain in recipe.domains:
            Path(domain.corpus.spec).touch()
        directory.begun_now(name)
        directory.done_now(name, 1.0, bool(recipe.export.interpolate_base))
    return directory


def without_stages(domain):
    return Recipe(
        name="a", base="b", domains=(Domain(corpus=Corpus(name=domain, spec=f"{domain}.jsonl"), role="new"),), stages=()
    )


def test_the_result_of_a_run_is_what_leaves_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage = Stage(
        name="s",
        method=Full(),
        mixture={"zh": 1.0},
        tokens=9,
        batch_size=1,
        sequence_length=9,
        optimizer=AdamW(learning_rate=1),
    )
    mixed = dataclasses.replace(without_stages("zh"), stages=(stage,), export=Export(interpolate_base=0.5))
    with ended(tmp_path / "sweep", base=without_stages("zh"), mixed=mixed) as directory:
        for name, result in (("base", 1.0), ("mixed", 0.25)):
            assert directory.of(name)["final"] == read_run(directory.run(name)).final == {"zh": result}
        assert directory.report() is not None
    with pytest.raises(UserError, match="add --exports"):
        _check_exports({"mixed": mixed}, Manner())
    _check_exports({"mixed": mixed}, Manner(exports=True))


def test_runs_that_make_no_page_are_told_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with ended(tmp_path / "sweep", a=without_stages("zh"), b=without_stages("en")) as directory:
        _report(directory)
        assert "no report: the runs have no domain in common" in capsys.readouterr().err


def test_a_long_message_moves_no_other_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ended(tmp_path / "sweep", a=without_stages("zh"), b=without_stages("zh")) as directory:
        before = directory.table().splitlines()
        directory.failed_now("b", "long " * 50)
        after = directory.table().splitlines()
    assert before[:3] == after[:3]
    assert after[3].endswith("long")
    # Figures of an earlier try are not those of the run that failed.
    assert "1.000" in before[3]
    assert "1.000" not in after[3]
    assert directory.of("b")["final"] == {}


def test_what_another_recipe_came_to_is_not_shown_as_this_ones(tmp_path, monkeypatch):
    """Where a sweep is killed before it has done the run again."""
    monkeypatch.chdir(tmp_path)
    before = {name: without_stages("zh") for name in ("changed", "same")}
    with ended(tmp_path / "sweep", **before):
        pass
    now = before | {"changed": dataclasses.replace(before["changed"], seed=7)}
    with SweepDirectory(tmp_path / "sweep", "e", now) as directory:
        assert list(directory.left(exports=False)) == ["changed"]
    found = SweepDirectory(tmp_path / "sweep", "e", now, claim=False)
    assert [found.of(name)["status"] for name in now] == ["waiting", "done"]
    base, changed, same = found.table().splitlines()[1:]
    assert "1.000" not in changed
    assert "1.000" in base
    assert "1.000" in same
    # Wanted with its export besides, a run keeps its figures until it has one.
    assert list(found.left(exports=True)) == ["changed", "same"]
    assert found.of("same")["status"] == "done"


def test_a_run_without_stages_that_a_queue_was_given_is_found_done(tmp_path):
    domain = Domain(corpus=Corpus(name="zh", spec=str(tmp_path / "zh.jsonl")), role="new")
    (tmp_path / "zh.jsonl").write_text("{}")
    recipe = Recipe(name="a", base="b", domains=(domain,), stages=())
    with SweepDirectory(tmp_path / "sweep", "e", {"a": recipe}) as directory:
        directory.begun_now("a")
        directory.record("a", status="queued", job="1")
        assert not directory.settle("a", exports=False)
        write_json_atomic(directory.run("a") / "config.json", to_json(recipe))
        write_json_atomic(directory.run("a") / MARKS / "evaluate-base-last.json", {"done": True})
        assert directory.settle("a", exports=False)
        assert directory.of("a")["status"] == "done"


def test_a_process_that_said_nothing_is_not_given_the_error_of_an_earlier_one(tmp_path, monkeypatch):
    recipe = Recipe(
        name="a", base="b", domains=(Domain(corpus=Corpus(name="zh", spec="zh.jsonl"), role="new"),), stages=()
    )
    monkeypatch.setattr(at_once, "by_memory", lambda *_: 1)
    monkeypatch.setattr(at_once.sys, "executable", str(tmp_path / "python"))
    errors = []
    with SweepDirectory(tmp_path / "sweep", "e", {"a": recipe}) as directory:
        for script in ("echo error: the disk is full; exit 2", "kill -9 $$"):
            (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / "python").chmod(0o755)
            at_once.run_at_once(directory, {"a": recipe}, Manner(at_once="auto"))
            errors.append(directory.failed()["a"])
    assert errors == ["the disk is full", f"its process ended with -9: see {directory.log('a')}"]
