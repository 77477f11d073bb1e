"""The train state on disk (orbax), with the data's position: what a run continues from."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from cpt_jax.checkpoint.intact import Checksummed, fault, steps
from cpt_jax.checkpoint.keep import METRIC, Keep, loss_of
from cpt_jax.checkpoint.stored import StoredCheckpoints, is_chunk, own_parts
from cpt_jax.core import processes
from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import say
from cpt_jax.core.storage import disk_full_is_told
from cpt_jax.core.tree import Tree


class Checkpoints:
    """The checkpoints of a stage; a save goes on in the background, and is there whole or not at all.

    Those whose files are not what was written are set aside (as damaged-STEP) when it is opened, down to the newest that
    is intact.

    Raises:
      UserError: there are some, and none is intact.
    """

    def __init__(self, directory: Path, keep: Keep | None = None, stored: StoredCheckpoints | None = None) -> None:
        self._directory, self._saving, self._stored = directory.absolute(), False, stored
        if stored is not None:
            # Which chunks are needed is known by what is restored.
            stored.fetch(lambda name: not is_chunk(name))
        if not processes.told(processes.is_first() and _set_aside_damaged(self._directory)):
            raise UserError(f"{directory} has checkpoints, and none is intact: remove it to begin the stage anew")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep or Keep(),
            # Not to choose by, but to have metrics written.
            best_fn=loss_of,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            temporary_path_class=Checksummed,
        )
        handlers = None
        if stored is not None:
            handlers = own_parts(options)
            self._directory.mkdir(parents=True, exist_ok=True)
        with disk_full_is_told(directory):
            self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    def save(self, state: Any, loader_state: dict, loss: float) -> None:
        """Saves a TrainState and the loader's state under the state's step, unless that step is there.

        Args:
          loss: mean of the steps since the save before.
        """
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        if self._stored is not None:
            # What is uploaded may not be removed meanwhile.
            self._finish()
            self._stored.wait()
        self._saving = True
        save = ocp.args.StandardSave if self._stored is None else ocp.args.PyTreeSave
        with disk_full_is_told(self._directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=save(state), loader=ocp.args.JsonSave({"state": json.dumps(loader_state)})
                ),
                metrics={METRIC: loss},
            )

    def restore(self, like: Any) -> tuple[Any, dict] | None:
        """The newest (TrainState, loader's state), placed as `like` is; None when there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        if self._stored is None:
            restore = ocp.args.StandardRestore(abstract)
        else:
            self._stored.fetch_shards(like)
            placed = ocp.checkpoint_utils.construct_restore_args(abstract)
            restore = ocp.args.PyTreeRestore(abstract, restore_args=placed)
        found = self._manager.restore(step, args=ocp.args.Composite(state=restore, loader=ocp.args.JsonRestore()))
        return found["state"], json.loads(found["loader"]["state"])

    def check(self) -> None:
        """Raises what went wrong in the background once that has ended, not only at the next save."""
        if self._saving and not self._manager.is_saving_in_progress():
            self._finish()
        if self._stored is not None:
            self._stored.check()

    def wait(self) -> None:
        """Returns when the save in the background is complete."""
        self._finish()
        if self._stored is not None:
            self._stored.wait()

    def _finish(self) -> None:
        """Returns when it is complete on this machine."""
        saving, self._saving = self._saving, False
        with disk_full_is_told(self._directory):
            self._manager.wait_until_finished()
        if saving and self._stored is not None:
            self._stored.put(self._manager.latest_step() or 0)

    def close(self) -> None:
        with disk_full_is_told(self._directory):
            self._manager.close()


def _set_aside_damaged(directory: Path) -> bool:
    """Renames the newest checkpoints as long as they are damaged; whether there is an intact one, or none at all."""
    wrong: dict[int, str] = {}
    for step in steps(directory):
        if (found := fault(directory / str(step))) is None:
            break
        wrong[step] = found
    else:
        return not wrong
    for damaged, found in wrong.items():
        aside = directory / f"damaged-{damaged}"
        shutil.rmtree(aside, ignore_errors=True)
        (directory / str(damaged)).rename(aside)
        say(f"{directory / str(damaged)} is damaged ({found}): set aside as {aside.name}; step {step} is taken instead")
    return True


def read_trained(directory: Path) -> dict[str, Tree]:
    """What a finished stage trained, on the host: {"last": weights} and, where an average was kept, "ema".

    Raises:
      UserError: there is no checkpoint, or the newest is damaged.
    """
    newest = next(iter(steps(directory)), None)
    if newest is None:
        raise UserError(f"{directory} holds no checkpoint: the stage has not been trained")
    path = directory.absolute() / str(newest)
    if (found := fault(path)) is not None:
        raise UserError(
            f"{path} is damaged ({found}): remove it, and run the recipe again: it goes on from the one before"
        )
    path = path / "state"
    # Whichever process asks reads it alone.
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=str(own)
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        metadata = dict(checkpointer.metadata(path).item_metadata)
        on_host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        # What the optimizer remembers is not read: of a checkpoint from a store it may not be here.
        like = jax.tree.map(lambda leaf: ocp.PLACEHOLDER, metadata)
        for name in metadata.keys() & {"trainable", "average"}:
            like[name] = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_host), metadata[name]
            )
        placed = ocp.checkpoint_utils.construct_restore_args(like)
        state = checkpointer.restore(path, args=ocp.args.PyTreeRestore(like, restore_args=placed))
    trained = {"last": state["trainable"]}
    if state.get("average"):
        trained["ema"] = state["average"]
    return jax.tree.map(np.asarray, trained)
