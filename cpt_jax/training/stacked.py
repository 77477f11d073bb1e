"""The states and weights of several runs as one: stacked along an axis of runs in front, or shared where they are the
same."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpt_jax.core.tree import Tree, flatten, unflatten
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.sharding.placement import place
from cpt_jax.training.program import Program, Settings
from cpt_jax.training.retention import start_of
from cpt_jax.training.state import TrainState
from cpt_jax.training.training import Training


def joint_settings(trainings: Sequence[Training]) -> Settings | None:
    """What is compiled for all of them, or None where that is not the same.

    A domain that some mix and others do not is one for all; rows may have as many documents as the longest list of any.
    """
    each = [_joint(training, trainings) for training in trainings]
    same = all(settings == each[0] for settings in each[1:])
    return each[0] if same and all(_can(training) for training in trainings) else None


def _joint(training: Training, trainings: Sequence[Training]) -> Settings:
    config = training.network.config
    documents = [other.network.config.documents for other in trainings]
    most = None if None in documents else max(filter(None, documents))
    config = dataclasses.replace(config, documents=most, runs=True)
    names = dict.fromkeys(name for other in trainings for name in other.loader.names)
    settings = dataclasses.replace(
        training.settings(), network=abstract_decoder(config, training.network.lora), names=tuple(names)
    )
    return settings.compiled()


def _can(training: Training) -> bool:
    if training.ema is not None and training.ema.on_host:
        return False
    # One that is watched, or whose text may end, may end before the others.
    if training.watching is not None or training.loader.may_end:
        return False
    return training.precision.frozen_kernels == "as computed" and training.profiled is None


@dataclasses.dataclass
class Stack:
    """What the runs hold on the devices: the program's arguments, and how one run is taken out and put in."""

    program: Program
    state: TrainState
    frozen: Tree
    start: Tree

    def one(self, index: int) -> TrainState:
        """A run's own state."""
        return _taken(self.state, index)

    def put(self, index: int, state: TrainState) -> None:
        self.state = _put(self.state, index, state)

    def like_one(self, settings: Settings) -> TrainState:
        """The shapes and places of a run's own state."""
        places = settings.program().placement
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=where), self.state, places
        )


@jax.jit
def _taken(state: TrainState, index: Any) -> TrainState:
    return jax.tree.map(lambda leaf: leaf[index], state)


def _put_one(state: TrainState, index: Any, one: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf, new: leaf.at[index].set(new), state, one)


_put = jax.jit(_put_one, donate_argnums=0)


def stacked(trainings: Sequence[Training], settings: Settings) -> Stack:
    """The runs as they begin."""
    weights = [flatten(training.weights) for training in trainings]
    trains, precision = settings.trains, trainings[0].precision
    host = {path: _joined([each[path] for each in weights], path in trains) for path in weights[0]}
    shared = frozenset(path for path, (_, same) in host.items() if same and path not in trains)
    start_shared = all(same for path, (_, same) in host.items() if path in trains)
    program = settings.program_of_many(shared, start_shared)
    placed = {
        path: place(leaf, jnp.float32 if path in trains else precision.dtype_of(path), program.where[path])
        for path, (leaf, _) in host.items()
    }
    trainable = unflatten({path: leaf for path, leaf in placed.items() if path in trains})
    start = start_of(trainable, trainings[0].retention)
    if start_shared:
        start = jax.tree.map(lambda leaf: leaf[0], start)
    frozen = unflatten({path: leaf for path, leaf in placed.items() if path not in trains})
    return Stack(program, program.begin(trainable), frozen, start)


def _joined(leaves: Sequence[Any], stack: bool) -> tuple[np.ndarray, bool]:
    """(one leaf of all runs, whether they are the same)."""
    first = np.asarray(leaves[0])
    others = [first if leaf is leaves[0] else np.asarray(leaf) for leaf in leaves[1:]]
    same = all(other is first or np.array_equal(other, first) for other in others)
    return (first if same and not stack else np.stack([first, *others])), same
