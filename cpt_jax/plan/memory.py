"""What takes a device's memory, by the compiled program and, where it does not tell, on paper."""

from collections import defaultdict
from typing import NamedTuple

from cpt_jax.core.tree import flatten
from cpt_jax.plan.hlo import Program
from cpt_jax.plan.paper import local_rows
from cpt_jax.plan.stage import CompiledStage
from cpt_jax.sharding.rules import shardings
from cpt_jax.training.memory import stage_memory


class ChipMemory(NamedTuple):
    """Bytes of one device.

    weights, optimizer, ema, batch: what a step is given (ema: also copies that retention keeps); padding: what their
    layout adds. temporaries: all else, of which `activations` (what the layers keep), `gradients` (of what trains,
    float32) and `logits` (of a chunk) are the largest parts; these are not all there at once. limit: None where it is
    not known.
    """

    weights: int
    optimizer: int
    ema: int
    batch: int
    padding: int
    temporaries: int
    activations: int
    gradients: int
    logits: int
    limit: int | None

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.ema + self.batch + self.padding + self.temporaries


def chip_memory(compiled: CompiledStage, program: Program | None) -> ChipMemory:
    """Of a compiled stage; activations are on paper where the program does not tell them."""
    planned, mesh, held, chip = compiled.planned, compiled.mesh, compiled.held, compiled.hardware.chip
    paper = stage_memory(
        compiled.network,
        planned.method.trains,
        planned.stage.optimizer,
        precision=planned.precision,
        rows=local_rows(planned.stage, dict(mesh.shape)),
        sequence_length=planned.stage.sequence_length // mesh.shape["context"],
        scores=compiled.network.config.attention == "xla",
        tensor=mesh.shape["tensor"],
    )
    looped = compiled.network.config.layer_loop == "scan"
    kept = kept_by_layers(compiled, program) if program is not None and looped else None
    return ChipMemory(
        weights=held["weights"],
        optimizer=held["optimizer"],
        ema=held["ema"] + held["start"],
        batch=held["batch"],
        padding=max(0, compiled.arguments - sum(held.values())),
        temporaries=compiled.temporaries,
        activations=paper.activations if kept is None else kept,
        gradients=compiled.trained,
        logits=paper.logits // mesh.shape["tensor"],
        limit=None if chip is None else int(chip.memory),
    )


def kept_by_layers(compiled: CompiledStage, program: Program) -> int | None:
    """Bytes that the layers' loops hand on to their backward passes: what the forward loops carry, stacked by layer,
    and has not the shape of weights; None where the layers are no loop."""
    config, network = compiled.network.config, compiled.network
    counts = set(dict(config.layer_groups).values()) or set(map(len, config.sections.values()))
    where = flatten(shardings(network.logical_axes, network.shapes, compiled.mesh))
    weights: set[tuple[int, ...]] = set()
    for path, leaf in flatten(network.shapes).items():
        weights |= {tuple(sorted(where[path].shard_shape(leaf.shape))), tuple(sorted(leaf.shape))}
    kept: dict[int, int] = defaultdict(int)
    for _, loop, _ in program.walk():
        trips = {array.dims[0] for array in loop.arrays if len(array.dims) > 2} if loop.op == "while" else set()
        if "transpose" in loop.op_name or not trips & counts:
            continue
        stacked = [array for array in loop.arrays if len(array.dims) > 2 and array.dims[0] in counts]
        carried = sum(array.bytes for array in stacked if tuple(sorted(array.dims)) not in weights)
        layers = stacked[0].dims[0]
        kept[layers] = max(kept[layers], carried)
    return sum(kept.values()) if kept else None
