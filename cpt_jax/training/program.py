"""The compiled part of a stage: how its state begins, its step, and where both lie on the mesh."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding

from cpt_jax.core.tree import Tree, flatten, partition
from cpt_jax.models.decoder import Network
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import Optimizer
from cpt_jax.sharding.rules import replicated, shardings
from cpt_jax.training.loss import make_loss
from cpt_jax.training.retention import Retention, without_weights
from cpt_jax.training.state import TrainState, initial_state
from cpt_jax.training.step import Step, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All that is compiled into a stage's step.

    Two stages whose settings are equal, and whose batches have the same shape, run one program: learning rates, their
    schedules, a teacher's weight, seeds and shares of the mixture are given to it step by step.

    Args:
      trains: the paths of the weights that do.
      names: of the domains.
    """

    network: Network
    trains: frozenset[str]
    names: tuple[str, ...]
    optimizer: Optimizer
    compute: str
    mesh: Mesh
    ema: EMA | None = None
    accumulate: int = 1
    retention: tuple[Retention, ...] = ()
    z_loss: float = 0.0

    def program(self) -> "Program":
        """The program, compiled when it is first called."""
        # What the host computes does not tell two programs apart.
        optimizer = dataclasses.replace(self.optimizer, learning_rate=1.0, max_skipped=1)
        return _program(dataclasses.replace(self, optimizer=optimizer, retention=without_weights(self.retention)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """`begin(trainable)` is the state before the first step; `step` donates the state; `where` gives each weight's
    sharding by its path."""

    begin: Callable[[Tree], TrainState]
    step: Step
    where: dict[str, NamedSharding]


@functools.lru_cache(maxsize=8)
def _program(settings: Settings) -> Program:
    network, mesh = settings.network, settings.mesh
    where = flatten(shardings(network.logical_axes, network.shapes, mesh))
    trainable, _ = partition(network.shapes, settings.trains.__contains__)
    optimizer = settings.optimizer.build(trainable)
    loss = make_loss(
        network,
        settings.compute,
        settings.trains.__contains__,
        settings.names,
        retention=settings.retention,
        z_loss=settings.z_loss,
    )
    step = make_train_step(loss, optimizer, settings.ema, settings.accumulate)

    def begin(trainable: Tree) -> TrainState:
        return initial_state(trainable, optimizer, settings.ema is not None)

    placement = _state_shardings(jax.eval_shape(begin, trainable), where, mesh, settings.ema)
    return Program(
        # Compiled, so that no two counters of the state are one buffer, which could not be donated twice.
        begin=jax.jit(begin, out_shardings=placement),
        step=jax.jit(step, donate_argnums=0, out_shardings=(placement, replicated(mesh))),
        where=where,
    )


def _state_shardings(state: TrainState, where: dict[str, NamedSharding], mesh: Mesh, ema: EMA | None) -> TrainState:
    """Optimizer moments and the average lie as the weights whose path and shape they have; counters and factored
    moments, which are small, are everywhere."""
    shapes = {path: leaf.shape for path, leaf in flatten(state.trainable).items()}

    def place(keys, leaf):
        path = "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
        # optax.partition's own group names come first.
        while path and path not in shapes:
            path = path.partition("/")[2]
        return where[path] if shapes.get(path) == leaf.shape else replicated(mesh)

    placed = jax.tree_util.tree_map_with_path(place, state)
    if ema is None or ema.memory_kind is None:
        return placed
    on_host = jax.tree.map(lambda sharding: sharding.with_memory_kind(ema.memory_kind), placed.average)
    return placed._replace(average=on_host)
