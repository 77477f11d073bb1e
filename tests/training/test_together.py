"""Runs trained by one program are the runs trained one by one, in what they learn, read and write."""

import dataclasses
import functools
import json
import multiprocessing
import os
import signal

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
from training_inputs import losses, training

from cpt_jax.adapt import Full, LoRA
from cpt_jax.checkpoint.train_state import read_trained
from cpt_jax.core.errors import Preempted, UserError
from cpt_jax.core.tree import flatten, unflatten
from cpt_jax.data.feed import Feed
from cpt_jax.data.loader import Loader
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.optim.schedules import Constant, Cosine
from cpt_jax.training import loop, together
from cpt_jax.training.loop import train
from cpt_jax.training.retention import Anchor, MeanTeacher
from cpt_jax.training.stacked import joint_settings
from cpt_jax.training.together import train_together
from cpt_jax.training.trackers import Tracking

# What a run differs in: mixture, learning rate, seed, schedule, teacher's weight.
RUNS = (
    ({"zh": 0.75, "en": 0.25}, 1e-2, 0, Cosine(), 0.5),
    ({"zh": 0.5, "en": 0.5}, 3e-3, 1, Constant(), 0.1),
    ({"zh": 1.0}, 1e-3, 2, Cosine(final=0.5), 0.3),
)


def maker(directories, mixture, seed):
    settings = dict(sequence_length=32, batch_size=8, start_id=0, end_id=1, tokenizer="numbers", seed=seed)
    return functools.partial(Loader, mixture, directories, **settings)


def group(directories, root, method, *, runs=RUNS, teacher=None, attention="auto", **changes):
    """(trainings, makers of their loaders)."""
    trainings, makers = [], []
    for index, (mixture, rate, seed, schedule, weight) in enumerate(runs):
        make = maker(directories, mixture, seed)
        optimizer = AdamW(learning_rate=rate, weight_decay=0.1, new_rows_multiplier=2.0)
        retention = () if teacher is None else (teacher(weight=weight),)
        given = dict(loader=make(), optimizer=optimizer, schedule=schedule, seed=seed, retention=retention)
        run = training(directories, root / str(index), method, **(given | changes))
        config = dataclasses.replace(run.network.config, attention=attention)
        run = dataclasses.replace(run, network=abstract_decoder(config, run.network.lora))
        if isinstance(method, LoRA):
            # Each has its own adapters, as a recipe's seed makes them.
            generator = np.random.default_rng(seed)
            flat = flatten(run.weights)
            factors = {path: generator.normal(0, 0.1, leaf.shape).astype(np.float32) for path, leaf in flat.items()}
            own = {path: factors[path] if path.endswith("lora_a") else leaf for path, leaf in flat.items()}
            run = dataclasses.replace(run, weights=unflatten(own))
        trainings.append(run)
        makers.append(make)
    return trainings, makers


def close(found, expected, tolerance=5e-5):
    """Each leaf, to within a share of its size. (Adam takes single weights whose gradient is next to nothing either way.)"""
    for path, leaf in flatten(expected).items():
        distance = np.linalg.norm(flatten(found)[path] - leaf)
        assert distance <= tolerance * np.linalg.norm(leaf), path


@pytest.mark.parametrize(
    ("method", "options"),
    [(Full(), dict(teacher=MeanTeacher)), (LoRA(rank=4, alpha=8), dict(attention="blocks"))],
    ids=["full, mean teacher", "lora, attention in blocks"],
)
def test_runs_together_are_the_single_runs(directories, tmp_path, method, options):
    singles, _ = group(directories, tmp_path / "single", method, steps=8, **options)
    expected = [train(run) for run in singles]
    results = train_together(*group(directories, tmp_path / "together", method, steps=8, **options))
    for index, (result, alone) in enumerate(zip(results, expected, strict=True)):
        for kind in ("last", "ema"):
            close(result[kind], alone[kind])
            stored = read_trained(tmp_path / "together" / str(index) / "checkpoints")[kind]
            jax.tree.map(np.testing.assert_array_equal, stored, result[kind])
        written, same = (
            [json.loads(line) for line in (tmp_path / name / str(index) / "metrics.jsonl").read_text().splitlines()]
            for name in ("together", "single")
        )
        assert [line.keys() for line in written] == [line.keys() for line in same]
        for line, other in zip(written, same, strict=True):
            # The same documents, step by step.
            assert [line[name] for name in ("step", "tokens")] == [other[name] for name in ("step", "tokens")]
            for name in ("loss", "learning_rate", *(key for key in other if key.startswith(("nats", "divergence")))):
                assert line[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6)
    assert not np.allclose(losses(tmp_path / "single" / "0"), losses(tmp_path / "single" / "1"))


ANCHORED = dict(method=LoRA(rank=4, alpha=8), teacher=Anchor)


@pytest.fixture(scope="module")
def whole(directories, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return root, train_together(*group(directories, root, **ANCHORED))


def preempted_after(step, module):
    real = module.Preemption.after
    patch = pytest.MonkeyPatch()
    patch.setattr(
        module.Preemption,
        "after",
        lambda self, number: (number == step and os.kill(os.getpid(), signal.SIGTERM)) or real(self, number),
    )
    return patch


def test_a_group_that_was_asked_to_end_goes_on_from_where_each_is(directories, tmp_path, whole):
    root, expected = whole

    def tracked():
        trainings, makers = group(directories, tmp_path, **ANCHORED)
        each = [Tracking(kinds=("tensorboard",), run="r", directory=run.directory) for run in trainings]
        return [dataclasses.replace(run, tracking=own) for run, own in zip(trainings, each, strict=True)], makers

    patch = preempted_after(3, together)
    with pytest.raises(Preempted, match="step 3"):
        train_together(*tracked())
    patch.undo()
    # One of them goes on alone for two steps; then all are at different ones.
    patch = preempted_after(5, loop)
    with pytest.raises(Preempted, match="step 5"):
        train(tracked()[0][1])
    patch.undo()
    results = train_together(*tracked())
    for index, (result, there) in enumerate(zip(results, expected, strict=True)):
        close(result["last"], there["last"])
        close(result["ema"], there["ema"])
        np.testing.assert_allclose(losses(tmp_path / str(index)), losses(root / str(index)), rtol=1e-5)
        # Its tracker holds its own figures, each step once.
        held = event_accumulator.EventAccumulator(str(tmp_path / str(index) / "tensorboard/stage"))
        held.Reload()
        told = [(event.step, event.value) for event in held.Scalars("loss")]
        assert told == [(step, np.float32(loss)) for step, loss in enumerate(losses(tmp_path / str(index)), 1)]


def test_a_run_that_cannot_go_on_takes_no_other_along(directories, tmp_path, whole):
    runs = (*RUNS[:2], (*RUNS[2][:1], 1e30, *RUNS[2][2:]))
    trainings, makers = group(directories, tmp_path, runs=runs, **ANCHORED)
    optimizer = dataclasses.replace(trainings[2].optimizer, max_skipped=2)
    trainings[2] = dataclasses.replace(trainings[2], optimizer=optimizer)
    *good, bad = train_together(trainings, makers)
    assert isinstance(bad, UserError)
    assert "lower the learning rate" in str(bad)
    for result, there in zip(good, whole[1][:2], strict=True):
        close(result["last"], there["last"])


def test_a_run_whose_checkpoints_are_damaged_takes_no_other_along(directories, tmp_path, whole):
    trainings, makers = group(directories, tmp_path, **ANCHORED)
    damaged = trainings[1].directory / "checkpoints" / "1"
    damaged.mkdir(parents=True)
    (damaged / "state").write_text("")
    first, wrong, last = train_together(trainings, makers)
    assert "has checkpoints, and none is intact" in str(wrong)
    for result, there in ((first, whole[1][0]), (last, whole[1][2])):
        close(result["last"], there["last"])


@pytest.mark.parametrize("attention", ["xla", "blocks", "cudnn"])
def test_runs_together_attend_as_each_would_alone(directories, tmp_path, attention):
    settings = joint_settings(group(directories, tmp_path, Full(), attention=attention)[0])
    assert settings is not None
    # And the kernel is told that there are runs.
    assert (settings.network.config.attention, settings.network.config.runs) == (attention, True)


def test_runs_that_differ_in_what_is_compiled_do_not_go_together(directories, tmp_path):
    trainings, makers = group(directories, tmp_path, Full())
    assert joint_settings(trainings) is not None
    for changes in (
        dict(ema=None),
        dict(ema=EMA(on_host=True)),
        dict(z_loss=1e-4),
        dict(optimizer=AdamW(learning_rate=1e-2, b2=0.95)),
    ):
        changed = [trainings[0], dataclasses.replace(trainings[1], **changes)]
        assert joint_settings(changed) is None
    with pytest.raises(UserError, match="one by one"):
        train_together(changed, makers[:2])


@pytest.mark.parametrize("processes", [0, 2])
def test_a_feed_gives_what_its_loaders_give(directories, processes):
    makers = [maker(directories, mixture, seed) for mixture, _, seed, *_ in (*RUNS, RUNS[1])]
    plain = [make() for make in makers]
    next(plain[2])
    states = [None, None, plain[2].state(), None]
    feed = Feed(makers, states, lambda made: made, processes)
    try:
        for _ in range(3):
            for made, loader in zip(next(feed), plain, strict=True):
                expected = next(loader)
                assert made.batch.keys() == expected.keys()
                for name, array in expected.items():
                    np.testing.assert_array_equal(made.batch[name], array)
                assert made.state == loader.state()
    finally:
        feed.close()


def test_a_process_of_the_feed_that_was_killed_is_told(directories):
    feed = Feed([maker(directories, {"zh": 1.0}, 0)], [None], lambda made: made, 1)
    try:
        next(feed)
        (child,) = multiprocessing.active_children()
        child.kill()
        with pytest.raises(UserError, match="a process that makes batches ended too early"):
            # What it had sent, as much as a pipe holds, is used first.
            for _ in range(10_000):
                next(feed)
    finally:
        feed.close()
