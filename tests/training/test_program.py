"""What is compiled, and what is given step by step; the average's places and intervals; times and profiles."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from training_inputs import losses, training

from cpt_jax.adapt import Full, LoRA
from cpt_jax.checkpoint.train_state import read_trained
from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import flatten, partition
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.optim.schedules import Constant
from cpt_jax.training.loop import train
from cpt_jax.training.metrics import StepClock, metrics_line
from cpt_jax.training.profile import ProfiledSteps
from cpt_jax.training.retention import MeanTeacher


def compilations(work) -> int:
    """How many programs JAX compiles while `work` is done."""
    count = 0

    def listen(event: str, _seconds: float, **_: object) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    work()
    jax.monitoring.unregister_event_duration_listener(listen)
    return count


def lines(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_stages_that_differ_in_rates_and_seeds_share_one_program(directories, tmp_path):
    method = LoRA(rank=4, alpha=8, dropout=0.1)
    first = training(directories, tmp_path / "first", method, steps=3, retention=(MeanTeacher(weight=0.1),))
    other = dataclasses.replace(
        training(directories, tmp_path / "second", method, steps=3),
        optimizer=dataclasses.replace(first.optimizer, learning_rate=3e-3, max_skipped=4),
        schedule=Constant(),
        retention=(MeanTeacher(weight=0.5, warmup=0.5),),
        seed=7,
    )
    assert compilations(lambda: train(first)) > 0
    assert compilations(lambda: train(other)) == 0
    assert first.program() is other.program()
    assert losses(tmp_path / "first") != losses(tmp_path / "second")
    rates = [line["learning_rate"] for line in lines(tmp_path / "second")]
    np.testing.assert_allclose(rates, [other.schedule.build(3e-3, 3)(step) for step in range(3)], rtol=1e-6)
    changed = dataclasses.replace(other, optimizer=AdamW(learning_rate=3e-3, b2=0.95))
    assert changed.program() is not other.program()


def test_what_adapters_drop_follows_from_the_seed(directories, tmp_path):
    for seed in (0, 0, 1):
        name = f"{seed}" if not (tmp_path / f"{seed}").exists() else "again"
        train(training(directories, tmp_path / name, LoRA(rank=4, alpha=8, dropout=0.5), steps=3, seed=seed))
    assert losses(tmp_path / "0") == losses(tmp_path / "again") != losses(tmp_path / "1")


@pytest.mark.parametrize("on_host", [False, True])
def test_an_average_moved_every_third_step_is_that_of_float64(directories, tmp_path, on_host):
    weights = {}
    for steps in range(8):
        run = training(
            directories, tmp_path / f"{steps}", Full(), steps=7, ema=EMA(decay=0.6, every=3, on_host=on_host), devices=4
        )
        if steps == 0:
            weights[0] = flatten(run.weights)
            continue
        # The same seven steps' first ones: the schedule is the whole run's.
        shortened = dataclasses.replace(run, schedule=_First(run.schedule, 7), steps=steps)
        train(shortened)
        weights[steps] = flatten(read_trained(tmp_path / f"{steps}" / "checkpoints")["last"])
    found = flatten(read_trained(tmp_path / "7" / "checkpoints")["ema"])
    for path, leaf in found.items():
        expected = np.asarray(weights[0][path], np.float64)
        for step in (2, 5):
            decay = min(0.6, (1 + step) / (10 + step)) ** 3
            expected = decay * expected + (1 - decay) * weights[step + 1][path]
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6, err_msg=path)


@dataclasses.dataclass(frozen=True)
class _First:
    """The first steps of a longer schedule."""

    schedule: object
    whole: int

    def build(self, peak: float, steps: int):
        return self.schedule.build(peak, self.whole)


def test_an_average_on_the_host_is_that_on_the_devices_and_teaches_the_same(directories, tmp_path):
    for on_host in (False, True):
        run = training(
            directories,
            tmp_path / str(on_host),
            LoRA(rank=4, alpha=8),
            steps=4,
            ema=EMA(decay=0.9, on_host=on_host),
            retention=(MeanTeacher(weight=0.5),),
            devices=8,
        )
        trainable, _ = partition(run.weights, run.trains)
        average = run.program().begin(trainable).average
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(average)}
        assert kinds == {"pinned_host" if on_host else "device"}
        train(run)
    assert losses(tmp_path / "True") == losses(tmp_path / "False")
    averages = [flatten(read_trained(tmp_path / str(kind) / "checkpoints")["ema"]) for kind in (False, True)]
    for path, leaf in averages[0].items():
        np.testing.assert_array_equal(averages[1][path], leaf)


def test_a_run_with_its_average_on_the_host_continues_bit_for_bit(directories, tmp_path):
    def run(name, steps):
        whole = training(directories, tmp_path / name, LoRA(rank=4, alpha=8), steps=6, ema=EMA(on_host=True, every=2))
        return dataclasses.replace(whole, schedule=_First(whole.schedule, 6), steps=steps)

    train(run("whole", 6))
    for steps in (3, 6):
        train(run("cut", steps))
    for kind in ("last", "ema"):
        whole, cut = (flatten(read_trained(tmp_path / name / "checkpoints")[kind]) for name in ("whole", "cut"))
        for path, leaf in whole.items():
            np.testing.assert_array_equal(cut[path], leaf)


def test_times_add_up_and_rates_follow_from_them(directories, tmp_path):
    run = training(directories, tmp_path, LoRA(rank=4, alpha=8), steps=4, checkpoint_seconds=0.0)
    train(run)
    for line in lines(tmp_path):
        parts = sum(line[f"{part}_seconds"] for part in ("data", "checkpoint", "compile", "compute"))
        assert parts == pytest.approx(line["seconds"])
        assert min(line["data_seconds"], line["compute_seconds"]) > 0
        flops = line["tokens_per_second"] * run.flops(32)
        assert line["model_flops_per_second"] == pytest.approx(flops)
        assert "mfu" not in line
    assert sum(line["checkpoint_seconds"] for line in lines(tmp_path)) > 0
    metrics = {
        name: np.float32(1) for name in ("loss", "learning_rate", "gradient_norm", "skipped", "skipped_in_a_row")
    }
    metrics |= {"nats": np.ones(1), "tokens": np.full(1, 50.0), "positions": np.full(1, 100.0)}
    line = metrics_line(3, metrics, ("zh",), {"seconds": 2.0}, 6e9, 1e12, {})
    assert (line["tokens"], line["tokens_per_second"], line["mfu"]) == (50, 50.0, pytest.approx(0.3))


def test_a_step_s_loss_is_the_mean_of_its_domains_by_their_tokens(directories, tmp_path):
    train(training(directories, tmp_path, LoRA(rank=4, alpha=8), steps=3))
    for line in lines(tmp_path):
        counts = {name.removeprefix("tokens/"): count for name, count in line.items() if name.startswith("tokens/")}
        assert len(counts) == 2
        assert sum(counts.values()) == line["tokens"]
        mean = sum(count * line[f"nats/{name}"] for name, count in counts.items()) / line["tokens"]
        assert line["loss"] == pytest.approx(mean)


def test_a_clock_gives_the_rest_to_the_devices():
    clock = StepClock()
    with clock.of("data"):
        pass
    lap = clock.lap()
    assert lap["compute_seconds"] == pytest.approx(lap["seconds"] - lap["data_seconds"])
    assert clock.lap()["data_seconds"] == 0


def test_chosen_steps_are_traced(directories, tmp_path):
    run = training(directories, tmp_path, LoRA(rank=4, alpha=8), steps=4, profiled=ProfiledSteps.parse("2:4"))
    train(run)
    (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    assert trace.stat().st_size > 1000
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    for text in ("3", "3:3", "0:2", "a:b", "4:2"):
        with pytest.raises(UserError, match="profile is"):
            ProfiledSteps.parse(text)
