"""The train state on disk (orbax), with the data's position: what a run continues from."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import disk_full_is_told
from cpt_jax.core.tree import Tree


class Checkpoints:
    """The newest two checkpoints of a stage; a save goes on in the background, and is there whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        with disk_full_is_told(directory):
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, state: Any, loader_state: dict) -> None:
        """Saves a TrainState and the loader's state under the state's step, unless that step is there."""
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        with disk_full_is_told(self._directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), loader=ocp.args.JsonSave({"state": json.dumps(loader_state)})
                ),
            )

    def restore(self, like: Any) -> tuple[Any, dict] | None:
        """The newest (TrainState, loader's state), placed as `like` is; None when there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        found = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), loader=ocp.args.JsonRestore())
        )
        return found["state"], json.loads(found["loader"]["state"])

    def wait(self) -> None:
        """Returns when the save in the background is complete."""
        with disk_full_is_told(self._directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def read_trained(directory: Path) -> dict[str, Tree]:
    """What a finished stage trained, on the host: {"last": weights} and, where an average was kept, "ema".

    Raises:
      UserError: there is no checkpoint.
    """
    steps = [int(path.name) for path in directory.iterdir() if path.name.isdecimal()] if directory.exists() else []
    if not steps:
        raise UserError(f"{directory} holds no checkpoint: the stage has not been trained")
    path = directory.absolute() / str(max(steps)) / "state"
    # Whichever process asks reads it alone.
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=str(own)
    )
    with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        on_host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_host), dict(metadata))
        state = checkpointer.restore(path, like)
    trained = {"last": state["trainable"]}
    if state.get("average"):
        trained["ema"] = state["average"]
    return jax.tree.map(np.asarray, trained)
