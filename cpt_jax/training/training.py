"""What a stage is trained with, and its weights on their devices."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from cpt_jax.checkpoint.keep import Keep
from cpt_jax.checkpoint.stored import StoredCheckpoints
from cpt_jax.core.errors import UserError
from cpt_jax.core.journal import Journal
from cpt_jax.core.precision import Precision
from cpt_jax.core.tree import Tree, flatten, partition, unflatten
from cpt_jax.data.loader import Loader
from cpt_jax.models.decoder import Network
from cpt_jax.models.quantised import quantise
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import Optimizer
from cpt_jax.optim.schedules import Schedule
from cpt_jax.sharding.hardware import peak_flops
from cpt_jax.sharding.placement import place as place_leaf
from cpt_jax.training.flops import token_flops
from cpt_jax.training.guard import HANG_SECONDS
from cpt_jax.training.memory import StageMemory, stage_memory
from cpt_jax.training.profile import ProfiledSteps
from cpt_jax.training.program import Program, Settings
from cpt_jax.training.retention import Anchor, MeanTeacher, Retention, teacher_weight
from cpt_jax.training.step import Controls
from cpt_jax.training.trackers import Tracking
from cpt_jax.training.watch import Watching


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """All that a stage of training needs, built: nothing here is looked up anywhere else."""

    name: str
    network: Network
    weights: Tree
    trains: Callable[[str], bool]
    loader: Loader
    optimizer: Optimizer
    schedule: Schedule
    ema: EMA | None
    steps: int
    accumulate: int
    precision: Precision
    mesh: Mesh
    directory: Path
    checkpoint_seconds: float
    retention: Sequence[Retention] = ()
    z_loss: float = 0.0
    seed: int = 0
    profiled: ProfiledSteps | None = None
    keep: Keep = Keep()
    hang_seconds: float | None = HANG_SECONDS
    journal: Journal = dataclasses.field(default_factory=Journal)
    stored: StoredCheckpoints | None = None
    watching: Watching | None = None
    tracking: Tracking | None = None

    def settings(self) -> Settings:
        """What is compiled into its step."""
        paths = frozenset(path for path in flatten(self.weights) if self.trains(path))
        if not paths:
            raise UserError(f"stage {self.name!r}: the method trains none of the model's weights")
        return Settings(
            network=self.network,
            trains=paths,
            names=self.loader.names,
            optimizer=self.optimizer,
            ema=self.ema,
            accumulate=self.accumulate,
            compute=self.precision.compute,
            retention=tuple(self.retention),
            z_loss=self.z_loss,
            mesh=self.mesh,
        )

    def program(self) -> Program:
        return self.settings().program()

    def controls(self) -> Callable[[int], Controls]:
        """What the step with a number (from 0) is given."""
        rate, seed = self.schedule.build(self.optimizer.learning_rate, self.steps), np.uint32(self.seed)

        def controls(step: int) -> Controls:
            taught = teacher_weight(self.retention, step, self.steps)
            return Controls(np.float32(rate(step)), np.float32(taught), seed)

        return controls

    def flops(self, sequence_length: int) -> float:
        """Model FLOPs a token."""
        teacher: Literal["average", "start"] | None = None
        if any(isinstance(part, MeanTeacher | Anchor) for part in self.retention):
            teacher = "average" if any(isinstance(part, MeanTeacher) for part in self.retention) else "start"
        return token_flops(self.network, self.trains, sequence_length, teacher=teacher).total

    def memory(self) -> StageMemory:
        """What it takes on paper."""
        return stage_memory(
            self.network,
            self.trains,
            self.optimizer,
            ema=self.ema,
            retention=self.retention,
            precision=self.precision,
            rows=self.loader.batch_size // self.accumulate,
            sequence_length=self.loader.sequence_length,
            scores=self.network.config.attention == "xla",
        )

    def refusal(self, line: dict[str, float]) -> UserError | None:
        """Why training ends with a step of whose metrics this is the line: too many in a row were skipped."""
        if line["skipped_in_a_row"] < self.optimizer.max_skipped:
            return None
        overflow = ", or compute in float32: float16 ends at 65,504" if self.precision.compute == "float16" else ""
        return UserError(
            f"{self.name}: {line['skipped_in_a_row']} steps in a row had a gradient that is not finite or far too large (step {line['step']}): lower the learning rate, or look at the data there{overflow}"
        )

    def peak_flops(self) -> float | None:
        """Of all devices together, FLOP/s, where it is known for the type of the products."""
        one = peak_flops(self.mesh.devices.flat[0].device_kind, self.precision.compute)
        return None if one is None else one * self.mesh.size


def place_weights(
    weights: Tree, trains: Callable[[str], bool], precision: Precision, where: dict[str, NamedSharding]
) -> tuple[Tree, Tree]:
    """(trainable float32, frozen in the compute type), each leaf where the rules put it."""
    trainable, frozen = (flatten(part) for part in partition(weights, trains))
    placed = {path: place_leaf(leaf, jnp.float32, where[path]) for path, leaf in trainable.items()}
    kept = {path: _frozen(leaf, path, precision, where[path]) for path, leaf in frozen.items()}
    return unflatten(placed), unflatten(kept)


def _frozen(leaf: Any, path: str, precision: Precision, sharding: NamedSharding) -> Any:
    """A frozen leaf on its devices: in the compute type, or, of the layers' kernels, quantised."""
    placed = place_leaf(leaf, precision.dtype_of(path), sharding)
    if precision.frozen_kernels == "as computed" or not path.endswith("/kernel"):
        return placed
    return jax.jit(quantise, static_argnums=1, donate_argnums=0)(placed, precision.frozen_kernels)
