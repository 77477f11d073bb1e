"""Checkpoints: what is damaged is told and not taken, what is to stay stays, a full disk harms none that is there."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpt_jax.checkpoint.intact import CHECKSUMS, fault, steps
from cpt_jax.checkpoint.keep import Keep
from cpt_jax.checkpoint.train_state import Checkpoints, read_trained
from cpt_jax.core.errors import UserError
from cpt_jax.training.state import TrainState


def state_at(step: int) -> TrainState:
    generator = np.random.default_rng(step)
    trainable = {"layers": {"kernel": jnp.asarray(generator.normal(size=(60, 70)), jnp.float32)}}
    return TrainState(jnp.asarray(step), trainable, {"count": jnp.asarray(step)}, None)


def saved(directory, losses, keep=None):
    checkpoints = Checkpoints(directory, keep)
    for step, loss in losses.items():
        checkpoints.save(state_at(step), {"position": step}, loss)
        checkpoints.wait()
    checkpoints.close()


def restored(directory):
    checkpoints = Checkpoints(directory)
    found = checkpoints.restore(state_at(0))
    checkpoints.close()
    assert found is not None
    state, loader_state = found
    step = int(state.step)
    jax.tree.map(np.testing.assert_array_equal, state, state_at(step))
    assert loader_state == {"position": step}
    return step


def files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def test_a_byte_changed_in_any_file_is_told_or_changes_nothing(tmp_path):
    saved(tmp_path, {1: 1.0, 2: 1.0})
    listed = (tmp_path / "2" / CHECKSUMS).read_text()
    told = 0
    for path in files(tmp_path / "2"):
        content = path.read_bytes()
        changed = bytearray(content)
        changed[len(content) // 2] ^= 0x10
        path.write_bytes(changed)
        name = str(path.relative_to(tmp_path / "2"))
        assert (fault(tmp_path / "2") is not None) == (name in listed or name == CHECKSUMS), name
        told += fault(tmp_path / "2") is not None
        if name not in listed and name != CHECKSUMS:
            assert restored(tmp_path) == 2
        path.write_bytes(content)
    assert told >= 10
    assert restored(tmp_path) == 2


@pytest.mark.parametrize("harm", ["changed", "a file gone", "cut", "all gone"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_taken(tmp_path, harm, capsys):
    saved(tmp_path, {1: 1.0, 2: 1.0})
    largest = max(files(tmp_path / "2"), key=lambda path: path.stat().st_size)
    if harm == "changed":
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif harm == "a file gone":
        largest.unlink()
    elif harm == "cut":
        largest.write_bytes(largest.read_bytes()[:-100])
    else:
        for path in files(tmp_path / "2"):
            path.unlink()
    with pytest.raises(UserError, match=r"2 is damaged .*: remove it, and run the recipe again"):
        read_trained(tmp_path)
    assert restored(tmp_path) == 1
    told = capsys.readouterr().err
    assert "is damaged" in told
    assert "step 1 is taken instead" in told
    # The step can be saved again.
    saved(tmp_path, {2: 1.0})
    assert restored(tmp_path) == 2
    assert (tmp_path / "damaged-2").is_dir()


def test_without_an_intact_checkpoint_it_stops(tmp_path):
    saved(tmp_path, {1: 1.0, 2: 1.0})
    for step in (1, 2):
        (tmp_path / str(step) / CHECKSUMS).unlink()
    with pytest.raises(UserError, match="none is intact: remove it to begin the stage anew"):
        Checkpoints(tmp_path)
    assert steps(tmp_path) == [2, 1]


def test_a_write_that_was_cut_off_is_no_checkpoint(tmp_path):
    saved(tmp_path, {1: 1.0})
    half = tmp_path / "2.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "some").write_text("bytes")
    assert restored(tmp_path) == 1
    assert not half.exists()


LOSSES = {2: 5.0, 3: float("nan"), 5: 4.0, 7: 1.0, 11: 3.0, 12: 2.0, 13: 6.0, 14: 7.0}


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (Keep(), [13, 14]),
        (Keep(last=1), [14]),
        (Keep(every=5), [2, 7, 12, 13, 14]),
        (Keep(last=1, best=2), [7, 12, 14]),
        (Keep(last=1, every=9, best=1), [2, 7, 11, 14]),
    ],
    ids=str,
)
def test_what_is_to_stay_stays_also_over_restarts(tmp_path, keep, expected):
    for step, loss in LOSSES.items():
        saved(tmp_path, {step: loss}, keep)
    assert sorted(steps(tmp_path)) == expected
    assert restored(tmp_path) == 14


def test_numbers_below_one_are_refused():
    for field in dataclasses.fields(Keep):
        with pytest.raises(UserError, match=f"keep: {field.name} is 0"):
            Keep(**{field.name: 0})


FULL = """
import time, sys
from pathlib import Path
import jax.numpy as jnp, numpy as np
from cpt_jax.checkpoint.train_state import Checkpoints
from cpt_jax.core.errors import UserError
from cpt_jax.training.state import TrainState

def state(step, rows):
    values = np.random.default_rng(step).normal(size=(rows, 1000))
    return TrainState(jnp.asarray(step), {"kernel": jnp.asarray(values, jnp.float32)}, {}, None)

checkpoints = Checkpoints(Path(sys.argv[1]))
checkpoints.save(state(1, 300), {}, 1.0)
checkpoints.wait()
checkpoints.save(state(2, 700), {}, 1.0)
try:
    for _ in range(200):
        time.sleep(0.05)
        checkpoints.check()
except UserError as error:
    print("told:", error)
again = Checkpoints(Path(sys.argv[1]))
found = again.restore(state(0, 300))
print("continues from", int(found[0].step), bool((found[0].trainable["kernel"] == state(1, 300).trainable["kernel"]).all()))
"""


def test_a_disk_that_fills_up_in_a_save_stops_the_run_and_harms_no_checkpoint(tmp_path):
    """On a file system of 3 MB, mounted in a namespace of its own."""
    mounted = f"mount -t tmpfs -o size=3m tmpfs {tmp_path} && "
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*namespace, mounted + "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    command = f"{mounted} exec {sys.executable} -c '{FULL}' {tmp_path}/run"
    done = subprocess.run([*namespace, command], capture_output=True, text=True, check=False)
    assert "told: the disk is full while writing" in done.stdout, done.stderr
    assert "continues from 1 True" in done.stdout
