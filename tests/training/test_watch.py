"""Forgetting while a stage trains: what is measured, what is done about it, and that it is the same when continued."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from training_inputs import FLOAT32, changed, losses, training

from cpt_jax.adapt import Full
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.data.mixture import Raised
from cpt_jax.evaluate.bits_per_byte import PackedDocuments, bits_per_byte
from cpt_jax.optim.averaging import EMA
from cpt_jax.training import watch
from cpt_jax.training.ending import ended_early
from cpt_jax.training.loop import train
from cpt_jax.training.state import TrainState
from cpt_jax.training.watch import RaiseReplay, Stop, Watch, Watcher, Watching, read_watch


def documents(seed: int, rows: int = 3, length: int = 32) -> PackedDocuments:
    tokens = np.random.default_rng(seed).integers(2, 60, (rows, length + 1)).astype(np.int32)
    arrays = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, length), np.int32),
        "weights": np.ones((rows, length), np.float32),
    }
    return PackedDocuments(arrays, rows * length, 2 * rows * length)


def watched(run, budget, base=1e-3, average=None, every=4):
    """The run with a watch; the base of "en" so good that any model is worse, or as is told."""
    watching = Watching(
        watch=Watch(every=every, budget=budget),
        network=run.network,
        documents={"en": documents(0), "zh": documents(1)},
        base={"en": base, "zh": 1e-3},
        old=("en",),
        replayed=("en",),
        batch_size=2,
        precision=FLOAT32,
        average=average,
    )
    return dataclasses.replace(run, watching=watching)


def share_read(lines: list[dict]) -> float:
    """That of "en" in the rows of some steps."""
    en, zh = (sum(line[f"read/{name}"] for line in lines) for name in ("en", "zh"))
    return en / (en + zh)


def test_it_measures_the_weights_in_training_and_without_a_budget_changes_nothing(directories, tmp_path):
    plain = train(training(directories, tmp_path / "plain", Full(), devices=8))
    run = training(directories, tmp_path / "watched", Full(), devices=8)
    trained = train(watched(run, None, average=run.ema, every=3))
    jax.tree.map(np.testing.assert_array_equal, plain, trained)
    lines = read_watch(tmp_path / "watched")
    assert [line["step"] for line in lines] == [0, 3, 6, 8]
    assert {line["action"] for line in lines} == {None}
    tokens = [json.loads(line)["tokens"] for line in (tmp_path / "watched" / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [0, sum(tokens[:3]), sum(tokens[:6]), sum(tokens)]
    for kind, field in (("last", "bits_per_byte"), ("ema", "average")):
        alone = bits_per_byte(
            run.network, trained[kind], documents(0), batch_size=3, precision=Precision(compute="float32")
        )
        assert lines[-1][field]["en"] == pytest.approx(alone.bits_per_byte, rel=1e-5)
    assert lines[0]["bits_per_byte"] == pytest.approx(lines[0]["average"])


def test_it_raises_replay_and_a_run_that_is_continued_does_the_same(directories, tmp_path):
    budget = RaiseReplay(limit=0.02, factor=1.4, maximum=0.45)
    steps = 40

    def run(name):
        return watched(training(directories, tmp_path / name, Full(), steps=steps), budget, every=8)

    whole = run("whole")
    train(whole)
    lines = read_watch(tmp_path / "whole")
    assert lines[0]["action"] is None
    assert [line["action"].partition(":")[0] for line in lines[1:3]] == [
        "raise replay from 25.0% to 35.0%",
        "raise replay from 35.0% to 45.0%",
    ]
    assert {line["action"] for line in lines[3:]} == {None}, "it is at its maximum"
    assert whole.loader.raised() == Raised(domains=("en",), factor=pytest.approx(1.4**2), maximum=0.45)
    counted = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert share_read(counted[:8]) == pytest.approx(0.25, abs=0.06)
    assert share_read(counted[-8:]) == pytest.approx(0.45, abs=0.06)

    cut = run("cut")
    draw = cut.loader

    class Dying:
        taken = 0

        def __getattr__(self, name):
            return getattr(draw, name)

        def __next__(self):
            self.taken += 1
            if self.taken > 21:
                raise KeyboardInterrupt
            return next(draw)

    # Saved after every step, and so at one at which it raised; killed behind it.
    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(cut, loader=Dying(), checkpoint_seconds=0))
    train(run("cut"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert read_watch(tmp_path / "cut") == lines
    plain = training(directories, tmp_path / "plain", Full(), steps=steps)
    train(plain)
    assert losses(tmp_path / "plain") != losses(tmp_path / "whole"), "more replay is other batches"


def test_it_stops_the_stage_with_a_last_checkpoint_and_a_start_more_changes_nothing(directories, tmp_path, capsys):
    run = watched(training(directories, tmp_path, Full()), Stop(limit=0.02))
    trained = train(run)
    step, why = ended_early(tmp_path) or (0, "")
    assert step == 4 == len(losses(tmp_path))
    assert why.startswith("stop: en is ")
    assert why.endswith("% worse than the base, the limit is 2.00%")
    assert "ends after step 4 of 8" in capsys.readouterr().err
    again = train(watched(training(directories, tmp_path, Full()), Stop(limit=0.02)))
    jax.tree.map(np.testing.assert_array_equal, trained, again)
    # A budget that is kept, in the same place: what was said of the end is taken back with the checkpoint's removal only.
    assert len(losses(tmp_path)) == 4
    kept = watched(training(directories, tmp_path / "kept", Full()), Stop(limit=0.02), base=1e6)
    train(kept)
    assert len(losses(tmp_path / "kept")) == 8
    assert ended_early(tmp_path / "kept") is None


def test_a_stage_that_begins_anew_has_its_first_measurement_once(directories, tmp_path):
    def killed(_):
        raise KeyboardInterrupt

    run = watched(training(directories, tmp_path, Full()), None)
    with pytest.raises(KeyboardInterrupt):
        train(changed(run, 3, 3, killed))
    assert [line["step"] for line in read_watch(tmp_path)] == [0]
    train(watched(training(directories, tmp_path, Full()), None))
    assert [line["step"] for line in read_watch(tmp_path)] == [0, 4, 8]


def test_a_stage_whose_text_ends_is_measured_at_its_end(directories, tmp_path):
    ends = changed(watched(training(directories, tmp_path, Full()), None), 6, 6, lambda _: None)
    train(ends)
    assert ended_early(tmp_path) == (5, "all text was read as often as max_epochs allows")
    assert [line["step"] for line in read_watch(tmp_path)] == [0, 4, 5]


def test_a_stage_without_text_for_a_step_is_refused(directories, tmp_path):
    with pytest.raises(UserError, match="no text for a first step"):
        train(changed(training(directories, tmp_path, Full()), 1, 1, lambda _: None))
    assert ended_early(tmp_path) is None


def test_a_model_that_says_no_number_is_over_its_budget(directories, tmp_path, monkeypatch):
    nothing = SimpleNamespace(bits_per_byte=float("nan"))
    monkeypatch.setattr(watch, "bits_per_byte", lambda *_, **__: nothing)
    train(watched(training(directories, tmp_path, Full()), Stop(limit=0.02), base=1.0))
    assert (ended_early(tmp_path) or (0, ""))[0] == 4
    for line in (tmp_path / "watch.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["bits_per_byte"] == {"en": None, "zh": None}
    assert all(np.isnan(line["bits_per_byte"]["en"]) for line in read_watch(tmp_path))


def test_the_budget_is_about_old_domains_as_they_are_exported_and_tells_the_worst(tmp_path, monkeypatch):
    monkeypatch.setattr(
        watch, "bits_per_byte", lambda _, weights, name, **__: SimpleNamespace(bits_per_byte=weights[name])
    )
    watching = Watching(
        watch=Watch(every=1, budget=Stop(limit=0.02)),
        network=None,  # type: ignore[arg-type]
        documents={name: name for name in ("en", "de", "zh")},  # type: ignore[arg-type]
        base=dict.fromkeys(("en", "de", "zh"), 1.0),
        old=("en", "de"),
        replayed=("en",),
        batch_size=1,
        precision=FLOAT32,
        average=EMA(),
    )
    watcher = Watcher(watching, None, tmp_path, 0)  # type: ignore[arg-type]
    good, worse = {"en": 1.0, "de": 1.01, "zh": 1.0}, {"en": 1.03, "de": 1.05, "zh": 1.5}
    for last, average, action in (
        (worse, good, None),
        (good, worse, "stop: de is 5.00% worse than the base, the limit is 2.00%"),
    ):
        state = TrainState(np.int32(4), last, None, average)  # type: ignore[arg-type]
        line, ends = watcher.look(state, {}, None, 100)  # type: ignore[arg-type]
        assert ends == line["action"] == action
        assert (line["bits_per_byte"], line["average"]) == (last, average)


def test_of_a_stage_that_goes_on_what_was_measured_up_to_there_is_kept(tmp_path):
    for first, kept in ((0, []), (3, [0]), (4, [0, 4]), (8, [0, 4, 8])):
        (tmp_path / "watch.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 4, 8)))
        Watcher(SimpleNamespace(), None, tmp_path, first)  # type: ignore[arg-type]
        assert [line["step"] for line in read_watch(tmp_path)] == kept


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Watch(every=0), "Watch.every is 0"),
        (lambda: Stop(limit=-0.1), "limit is -0.1"),
        (lambda: RaiseReplay(factor=1.0), "factor is 1.0"),
        (lambda: RaiseReplay(maximum=1.0), "maximum is 1.0"),
    ],
)
def test_wrong_watches_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()
