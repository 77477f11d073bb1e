"""The compiled part of a stage: how its state begins, its step, and where both lie on the mesh."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cpt_jax.core.tree import Tree, flatten, partition, unflatten
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

    def compiled(self) -> "Settings":
        """These settings without what the host computes, which does not tell two programs apart."""
        optimizer = dataclasses.replace(self.optimizer, learning_rate=1.0, max_skipped=1)
        return dataclasses.replace(self, optimizer=optimizer, retention=without_weights(self.retention))

    def program(self) -> "Program":
        """The program, compiled when it is first called."""
        return _program(self.compiled())

    def program_of_many(self, shared: frozenset[str], start_shared: bool) -> "Program":
        """The same for several runs at once: state, batch and controls have an axis of runs in front, and so have the
        frozen weights but those at `shared` paths, and, unless it is shared too, `start`."""
        return _program_of_many(self.compiled(), shared, start_shared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """`begin(trainable)` is the state before the first step; `step` donates the state; `where` gives each weight's
    sharding by its path, `placement` those of the state."""

    begin: Callable[[Tree], TrainState]
    step: Step
    where: dict[str, NamedSharding]
    placement: TrainState

    def like(self, trainable: Tree) -> TrainState:
        """The shapes, types and places of the state that `begin` makes of this."""
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            jax.eval_shape(self.begin, trainable),
            self.placement,
        )


@functools.lru_cache(maxsize=8)
def _program(settings: Settings) -> Program:
    begin, step, where, placement = _functions(settings)
    return Program(
        # Compiled, so that no two counters of the state are one buffer, which could not be donated twice.
        begin=jax.jit(begin, out_shardings=placement),
        step=jax.jit(step, donate_argnums=0, out_shardings=(placement, replicated(settings.mesh))),
        where=where,
        placement=placement,
    )


@functools.lru_cache(maxsize=8)
def _program_of_many(settings: Settings, shared: frozenset[str], start_shared: bool) -> Program:
    begin, step, where, placement = _functions(settings)
    stacked = jax.tree.map(of_runs, placement)
    frozen = {path: None if path in shared else 0 for path in where if path not in settings.trains}
    many = jax.vmap(step, in_axes=(0, unflatten(frozen), None if start_shared else 0, 0, 0))
    return Program(
        begin=jax.jit(jax.vmap(begin), out_shardings=stacked),
        step=jax.jit(many, donate_argnums=0, out_shardings=(stacked, replicated(settings.mesh))),
        where={path: place if path in shared else of_runs(place) for path, place in where.items()},
        placement=stacked,
    )


def of_runs(where: NamedSharding) -> NamedSharding:
    """Where an array lies that has an axis of runs, which is not cut, in front."""
    return where.update(spec=PartitionSpec(None, *where.spec))


def _functions(settings: Settings) -> tuple[Callable, Step, dict[str, NamedSharding], TrainState]:
    """(begin, step, where each weight lies, where the state does) of one run."""
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

    return begin, step, where, _state_shardings(jax.eval_shape(begin, trainable), where, mesh, settings.ema)


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
