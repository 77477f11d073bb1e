"""A stage of a recipe: all that one stretch of training is made of."""

import dataclasses
import math

from cpt_jax.adapt import Method
from cpt_jax.checkpoint.keep import Keep
from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import MOST_BYTES, is_file_name
from cpt_jax.data.documents import LongDocuments
from cpt_jax.data.mixture import Mixture, check_mixture, domains_of
from cpt_jax.data.packing import Packing
from cpt_jax.data.rows import PackDomains
from cpt_jax.models.remat import Remat
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import Optimizer
from cpt_jax.optim.schedules import Cosine, Schedule
from cpt_jax.sharding.mesh import MeshShape
from cpt_jax.sharding.rules import RULES
from cpt_jax.training.retention import Retention, check_retention
from cpt_jax.training.watch import Watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training: what trains, on which mixture, for how many tokens, and how fast.

    `retention` holds the model to what it knew, besides replay; `z_loss` keeps the logits' normaliser small.
    `mixture` gives each domain's share of the tokens, constant or changing over the stage; `packing` puts several
    documents in a row, or each in its own; `pack_domains`: of several domains, or each row of one; `long_documents`:
    what becomes of those longer than a row. A domain that was read as often as `max_epochs` says gives its share to the
    others; where none is left the stage ends. `watch` measures old domains on the way, and may act. A step takes `batch_size` rows of `sequence_length` tokens; with
    `accumulate` > 1 it computes them in that many parts, one after the other. `remat` saves memory: what the backward
    pass computes again. `keep`: which of the checkpoints stay.
    """

    name: str
    method: Method
    mixture: Mixture
    tokens: int
    batch_size: int
    sequence_length: int
    optimizer: Optimizer
    schedule: Schedule = Cosine()
    ema: EMA | None = None
    accumulate: int = 1
    retention: tuple[Retention, ...] = ()
    z_loss: float = 0.0
    remat: Remat | None = None
    packing: Packing = "best fit"
    pack_domains: PackDomains = "together"
    long_documents: LongDocuments = "split"
    max_epochs: dict[str, int] | None = None
    watch: Watch | None = None
    checkpoint_seconds: float = 60.0
    keep: Keep = Keep()

    def __post_init__(self) -> None:
        if not self.z_loss >= 0:
            raise UserError(f"stage {self.name!r}: z_loss is {self.z_loss}: give 0 or more (1e-4 is usual)")
        check_retention(self.retention, domains_of(self.mixture), self.ema is not None)
        for field in ("tokens", "batch_size", "sequence_length", "accumulate"):
            if getattr(self, field) < 1:
                raise UserError(f"stage {self.name!r}: {field} is {getattr(self, field)}: give a number of at least 1")
        if self.ema is not None and self.ema.every > self.steps:
            raise UserError(
                f"stage {self.name!r}: the moving average moves after every {self.ema.every} steps, and the stage has {self.steps}: lower ema.every"
            )
        if not self.checkpoint_seconds >= 0:
            raise UserError(
                f"stage {self.name!r}: checkpoint_seconds is {self.checkpoint_seconds}: give 0 (after each step) or more"
            )
        check_mixture(self.mixture)
        for domain, epochs in (self.max_epochs or {}).items():
            if domain not in domains_of(self.mixture):
                raise UserError(
                    f"stage {self.name!r}: max_epochs names {domain!r}; it mixes {', '.join(domains_of(self.mixture))}"
                )
            if epochs < 1:
                raise UserError(f"stage {self.name!r}: max_epochs of {domain!r} is {epochs}: give at least 1")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"stage {self.name!r}: a batch of {self.batch_size} rows does not divide into accumulate={self.accumulate} parts"
            )
        if not is_file_name(self.name) or self.name in ("base", "extended", "export"):
            raise UserError(
                f"stage name {self.name!r}: give one of at most {MOST_BYTES} bytes without '/' that is not 'base', 'extended' or 'export'"
            )

    def check_mesh(self, shape: MeshShape) -> None:
        """Raises a UserError where a part of the batch cannot be cut over a mesh (whose `fsdp` is known)."""
        sizes = {axis: getattr(shape, axis) for axis in RULES["batch"]}
        rows, devices = self.batch_size // self.accumulate, math.prod(sizes.values())
        if rows % devices:
            axes = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
            parts = f" in {self.accumulate} parts of {rows}" if self.accumulate > 1 else ""
            raise UserError(
                f"stage {self.name!r}: a batch of {self.batch_size} rows{parts} does not divide over the mesh's {axes} (= {devices}): give a multiple, or another --mesh"
            )
        if self.sequence_length % shape.context:
            raise UserError(
                f"stage {self.name!r}: rows of {self.sequence_length} tokens do not divide over the mesh's context {shape.context}"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps: enough for at least `tokens` tokens."""
        return -(-self.tokens // (self.batch_size * self.sequence_length))
