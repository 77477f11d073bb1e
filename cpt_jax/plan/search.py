"""Meshes, rematerialisation and batch sizes, ranked on paper; the best are compiled."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import say
from cpt_jax.models.remat import Remat
from cpt_jax.plan.hardware import ISLAND, Hardware
from cpt_jax.plan.paper import PaperStep, on_paper
from cpt_jax.plan.plan import StagePlan, plan_stage
from cpt_jax.plan.stage import PlannedStage
from cpt_jax.sharding.mesh import MeshShape, make_mesh

TENSOR = CONTEXT = (1, 2, 4, 8)
ROWS = (1, 2, 4, 8)
REMATS: tuple[Remat | None, ...] = (
    None,
    Remat(products=True, keep=("attention_out",)),
    Remat(keep=("attention_out",)),
    Remat(),
)
# Of a device's memory, what paper may fill: a program takes more.
FILLED = 0.85


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to run a stage, and its step on paper."""

    planned: PlannedStage
    shape: MeshShape
    paper: PaperStep
    seconds: float
    fits: bool

    @property
    def tokens_per_second(self) -> float:
        stage = self.planned.stage
        return stage.batch_size * stage.sequence_length / self.seconds

    @property
    def order(self) -> tuple[bool, float]:
        # Of those that do not fit, the one that is nearest to it.
        return not self.fits, -self.tokens_per_second if self.fits else self.paper.total


def candidates(
    planned: PlannedStage,
    hardware: Hardware,
    shape: MeshShape | None = None,
    *,
    batch_size: int | None = None,
    remat_given: bool = False,
) -> list[Candidate]:
    """All ways, the fastest on paper first, those that do not fit there last; what is given is not varied.

    A batch that is given is computed in as many parts as it takes for 1, 2, 4 or 8 rows on each device.
    """
    found = []
    for mesh_shape in [shape.over(hardware.chips)] if shape is not None else _shapes(planned, hardware):
        for remat in (planned.stage.remat,) if remat_given else REMATS:
            for rows in ROWS:
                part = rows * mesh_shape.replica * (mesh_shape.fsdp or 1) * mesh_shape.expert
                size = part if batch_size is None else batch_size
                if size % part or planned.stage.sequence_length % mesh_shape.context:
                    continue
                changes: dict[str, Any] = {"remat": remat, "batch_size": size, "accumulate": size // part}
                stage = dataclasses.replace(planned.stage, **changes)
                found.append(candidate_of(dataclasses.replace(planned, stage=stage), hardware, mesh_shape))
    return sorted(found, key=lambda each: each.order)


def _shapes(planned: PlannedStage, hardware: Hardware) -> Iterator[MeshShape]:
    """fsdp with up to 8 devices for a row, along tensor (whose parts of heads and feed-forward are whole) and context,
    and whole copies of the weights for each slice or island."""
    config, length = planned.config, planned.stage.sequence_length
    heads = math.gcd(*(config.heads_of(kind).groups for kind in config.layer_kinds))
    for replica in sorted({1, hardware.slices, max(1, hardware.chips // ISLAND) if hardware.platform == "gpu" else 1}):
        for tensor, context in itertools.product(TENSOR, CONTEXT):
            whole = heads % tensor == config.intermediate_size % tensor == length % (128 * context) == 0
            if (
                tensor * context <= 8
                and (whole or tensor == context == 1)
                and hardware.chips % (replica * tensor * context) == 0
            ):
                yield MeshShape(replica=replica, tensor=tensor, context=context).over(hardware.chips)


def candidate_of(planned: PlannedStage, hardware: Hardware, shape: MeshShape) -> Candidate:
    paper, chip = on_paper(planned, shape, hardware.platform), hardware.chip
    peak = hardware.peak_flops(planned.precision.compute)
    if chip is None or peak is None:
        raise UserError(f"--search ranks by a device's memory and speed, which are not known of {hardware.name!r}")
    mesh = make_mesh(hardware.devices(), shape)
    exchange = sum(sent / hardware.bandwidth(mesh, (axis,)) for axis, sent in paper.sent.items())
    remat = planned.stage.remat
    # The forward pass once more is a third of full training; with products kept, next to nothing.
    again = 1.0 if remat is None or remat.products else 4 / 3
    seconds = paper.flops * again / peak + exchange
    fits = paper.total <= FILLED * chip.memory
    return Candidate(planned=planned, shape=shape, paper=paper, seconds=seconds, fits=fits)


def search(ranked: list[Candidate], hardware: Hardware, compiled: int, price: float | None) -> list[StagePlan]:
    """The first of the candidates compiled: those that fit first, then the quickest for a token."""
    plans = []
    for number, each in enumerate(ranked[:compiled], 1):
        say(f"compiling {number} of {min(compiled, len(ranked))}: {named(each.planned, each.shape)}")
        plans.append(plan_stage(each.planned, hardware, each.shape, price))
    return sorted(plans, key=_order)


def _order(plan: StagePlan) -> tuple[bool, float]:
    stage = plan.compiled.planned.stage
    seconds = (plan.step_seconds or (float("inf"), float("inf")))[1]
    return not plan.fits, seconds / (stage.batch_size * stage.sequence_length)


def named(planned: PlannedStage, shape: MeshShape) -> str:
    sizes = [f"{name}={size}" for name, size in dataclasses.asdict(shape).items() if size != 1]
    stage = planned.stage
    parts = f" in {stage.accumulate} parts" if stage.accumulate > 1 else ""
    return f"{','.join(sizes) or 'fsdp=1'}, {stage.batch_size} rows{parts}, remat {remat_name(stage.remat)}"


def remat_name(remat: Remat | None) -> str:
    """As `--remat` takes it."""
    if remat is None:
        return "none"
    if remat == Remat():
        return "all"
    return ",".join([*(["products"] if remat.products else []), *remat.keep])


def remat_named(name: str) -> Remat | None:
    """Of "none", "all", or what is kept: "products", or activations by name, with commas between."""
    if name in ("none", "all"):
        return None if name == "none" else Remat()
    kept = name.split(",")
    return Remat(products="products" in kept, keep=tuple(each for each in kept if each != "products"))
