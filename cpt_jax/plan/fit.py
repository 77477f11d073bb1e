"""Steps cut so that they fit into the devices that are here."""

import dataclasses
import math
from collections.abc import Iterator

import jax

from cpt_jax.plan.paper import on_paper
from cpt_jax.plan.search import FILLED, REMATS
from cpt_jax.plan.stage import PlannedStage, planned_stages
from cpt_jax.recipe.recipe import Recipe, Stage
from cpt_jax.sharding.mesh import MeshShape, preset
from cpt_jax.sharding.rules import RULES


def fitted(recipe: Recipe, hf_config: dict, memory: int, shape: MeshShape | None = None) -> tuple[Recipe, str]:
    """(the recipe with steps for which each device here has room in `memory` bytes, what they take).

    On paper: a batch without room is taken in parts, down to a row a device, which leaves the products as many; then more
    and more of the layers is computed again. A stage that says how for itself (`accumulate`, `remat`) is left as it is. Where
    nothing is small enough the smallest is taken: paper may be wrong.

    Args:
      shape: of the mesh (default: as a run chooses it).

    Raises:
      UserError: the mesh does not cover the devices.
    """
    stages, most = [], 0.0
    for planned in planned_stages(recipe, hf_config):
        options = list(_options(planned, shape)) or [planned]
        sizes = [_bytes(option, shape) for option in options]
        chosen = next((number for number, size in enumerate(sizes) if size <= FILLED * memory), sizes.index(min(sizes)))
        stages.append(options[chosen].stage)
        most = max(most, sizes[chosen])
    said = f"{most / 1e9:.1f} of {memory / 1e9:.1f} GB a device, on paper"
    if most > FILLED * memory:
        said += ": likely too much; shorter rows, --method lora, --precision.frozen_kernels nf4 or a smaller model take less"
    return dataclasses.replace(recipe, stages=tuple(stages)), said


def _options(planned: PlannedStage, shape: MeshShape | None) -> Iterator[PlannedStage]:
    stage = planned.stage
    if stage.accumulate > 1 or stage.remat is not None:
        return
    sizes = dataclasses.asdict(_shape(stage, shape))
    devices = math.prod(sizes[axis] for axis in RULES["batch"])
    parts = [part for part in range(1, stage.batch_size + 1) if stage.batch_size % (part * devices) == 0]
    for part in parts:
        yield dataclasses.replace(planned, stage=dataclasses.replace(stage, accumulate=part))
    for remat in REMATS[1:] if parts else ():
        yield dataclasses.replace(planned, stage=dataclasses.replace(stage, accumulate=parts[-1], remat=remat))


def _shape(stage: Stage, shape: MeshShape | None) -> MeshShape:
    devices = jax.devices()
    return (shape or preset(devices, stage.batch_size // stage.accumulate, stage.sequence_length)).over(len(devices))


def _bytes(planned: PlannedStage, shape: MeshShape | None) -> float:
    return on_paper(planned, _shape(planned.stage, shape), jax.default_backend()).total
