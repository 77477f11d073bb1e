"""Asked to end, hung, or with a loss that is no number: what a run does."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from training_inputs import changed, losses, training

from cpt_jax.adapt import Full, LoRA
from cpt_jax.checkpoint.intact import steps
from cpt_jax.checkpoint.train_state import Checkpoints, read_trained
from cpt_jax.core.errors import TRY_AGAIN, Preempted, UserError
from cpt_jax.core.journal import Journal
from cpt_jax.core.precision import Precision
from cpt_jax.core.storage import read_objects
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.training.guard import Preemption, ends_when_asked
from cpt_jax.training.loop import train
from cpt_jax.training.metrics import read_metrics


def asked_to_end(batch):
    os.kill(os.getpid(), signal.SIGTERM)
    return batch


def no_number(batch):
    """A token so heavy that the sum of losses is infinite, and its gradient no number."""
    weights = batch["weights"].copy()
    weights[0, 0] = 1e38
    return batch | {"weights": weights}


def test_sigterm_saves_after_the_step_and_the_run_goes_on_bit_for_bit(directories, tmp_path):
    method = LoRA(rank=4, alpha=8, dropout=0.2)
    whole = train(training(directories, tmp_path / "whole", method))
    cut, journal = tmp_path / "cut", Journal(tmp_path / "events.jsonl")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match=r"stage: step 4 is saved \(\d+\.\d s\): run the same command again"):
        train(changed(training(directories, cut, method, journal=journal), 4, 4, asked_to_end))
    assert signal.getsignal(signal.SIGTERM) == handler
    assert steps(cut / "checkpoints") == [4]
    assert len(losses(cut)) == 4
    again = train(training(directories, cut, method, journal=journal))
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    assert losses(cut) == losses(tmp_path / "whole")
    events = [(event["event"], event.get("first")) for event in read_objects(tmp_path / "events.jsonl")]
    assert events == [("training", 1), ("preempted", None), ("training", 5), ("trained", None)]


def test_outside_of_training_it_ends_at_once():
    with pytest.raises(Preempted, match="what was finished is kept"), ends_when_asked():
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted), ends_when_asked(), Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.after(1)


def test_sigterm_while_the_last_checkpoint_is_written_ends_it_too(directories, tmp_path, monkeypatch):
    whole, wait = train(training(directories, tmp_path / "whole", Full())), Checkpoints.wait

    def asked(self):
        asked_to_end(None)
        wait(self)

    monkeypatch.setattr(Checkpoints, "wait", asked)
    with pytest.raises(Preempted, match="what was finished is kept"):
        train(training(directories, tmp_path / "cut", Full()))
    monkeypatch.undo()
    jax.tree.map(np.testing.assert_array_equal, train(training(directories, tmp_path / "cut", Full())), whole)


def test_steps_without_a_finite_loss_are_left_out_and_too_many_in_a_row_stop_it(directories, tmp_path):
    few = changed(training(directories, tmp_path / "few", Full()), 3, 4, no_number)
    train(few)
    text = (tmp_path / "few" / "metrics.jsonl").read_text()
    # NaN and Infinity are no JSON: what reads strictly would refuse the whole file.
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [line["loss"] is None for line in lines] == [line["nats/zh"] is None for line in lines]
    lines = read_metrics(tmp_path / "few")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert [np.isfinite(line["loss"]) for line in lines] == [True, True, False, False, True, True, True, True]
    for leaf in jax.tree.leaves(read_trained(tmp_path / "few" / "checkpoints")):
        assert np.isfinite(leaf).all()
    many = training(
        directories,
        tmp_path / "many",
        Full(),
        optimizer=AdamW(learning_rate=1e-2, max_skipped=3),
        checkpoint_seconds=0.0,
        precision=Precision(compute="float16"),
    )
    with pytest.raises(UserError, match=r"3 steps in a row had a gradient that is not finite .* or compute in float32"):
        train(changed(many, 3, 8, no_number))
    for leaf in jax.tree.leaves(read_trained(tmp_path / "many" / "checkpoints")):
        assert np.isfinite(leaf).all()


HUNG = """
import time
from cpt_jax.training.guard import Watchdog

def waits_for_another_host():
    time.sleep(60)

with Watchdog("stage-lora", {seconds}) as watchdog:
    for _ in range(6):
        time.sleep(0.3)
        watchdog.beat()
    print("six steps", flush=True)
    if {hangs}:
        waits_for_another_host()
"""


@pytest.mark.parametrize("hangs", [True, False])
def test_a_watchdog_says_where_it_hangs_and_ends_it(hangs):
    command = [sys.executable, "-c", HUNG.format(seconds=1.0, hangs=hangs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "six steps\n"
    if not hangs:
        assert (done.returncode, done.stderr) == (0, "")
        return
    assert done.returncode == TRY_AGAIN
    assert "stage-lora: no step has ended for 1 s; process 0 is here:" in done.stderr
    assert "in waits_for_another_host" in done.stderr
    assert done.stderr.count("Thread 0x") >= 1
