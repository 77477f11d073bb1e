"""A step on paper: memory and collectives of one device by the sizes of model, batch and mesh alone.

What fully sharded data parallelism and tensor parallelism have to do (Rajbhandari et al. 2019, arXiv 1910.02054; Shoeybi
et al. 2019, arXiv 1909.08053); the compiled program may do more.
"""

import dataclasses
import math

from cpt_jax.core.tree import flatten
from cpt_jax.models.decoder import Network, head_path
from cpt_jax.plan.stage import PlannedStage
from cpt_jax.recipe.recipe import Stage
from cpt_jax.sharding.hardware import compiling_for
from cpt_jax.sharding.mesh import MeshShape
from cpt_jax.sharding.rules import RULES
from cpt_jax.training.flops import token_flops
from cpt_jax.training.memory import stage_memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperStep:
    """Of one device: bytes between steps, at most within one, and what it sends along each axis in one step; model
    FLOPs."""

    held: float
    temporary: float
    sent: dict[str, float]
    flops: float

    @property
    def total(self) -> float:
        return self.held + self.temporary


def local_rows(stage: Stage, mesh_shape: dict[str, int]) -> int:
    """Rows of one device in one part of a step."""
    return stage.batch_size // stage.accumulate // math.prod(mesh_shape[axis] for axis in RULES["batch"])


def on_paper(planned: PlannedStage, shape: MeshShape, platform: str) -> PaperStep:
    """A stage's step on a mesh whose `fsdp` is filled in."""
    stage, network = planned.stage, planned.network(platform, shape.context)
    sizes = dataclasses.asdict(shape)
    rows, length = local_rows(stage, sizes), stage.sequence_length // shape.context
    with compiling_for(platform):
        memory = stage_memory(
            network,
            planned.method.trains,
            stage.optimizer,
            ema=stage.ema,
            retention=stage.retention,
            precision=planned.precision,
            rows=rows,
            sequence_length=length,
            scores=network.config.attention == "xla",
            tensor=shape.tensor,
        )
    tokens, item, cut = rows * length, planned.precision.dtype.itemsize, shape.tensor * (shape.fsdp or 1)
    # Whole while they are used: one layer's weights and the head's, in the compute type; a head that trains has its
    # gradient whole, in float32, before the devices' are added. The loops are given all trained weights rounded.
    head = max(
        leaf.size for path, leaf in flatten(network.shapes).items() if path.startswith(head_path(network.config))
    )
    trains = any(planned.method.trains(f"{head_path(network.config)}/{part}") for part in ("base", "new"))
    whole = item * (_layers(network) / network.config.num_layers + head) / shape.tensor
    whole += 4 * head / shape.tensor if trains else 0
    rounded = item * memory.gradients / 4 / cut
    # In parts, a part's gradients are added to the sum of those before.
    gradients = memory.gradients / cut * (1 if stage.accumulate == 1 else 2)
    temporary = memory.activations + gradients + rounded + memory.logits / shape.tensor + whole
    flops = token_flops(network, planned.method.trains, stage.sequence_length).total
    devices = math.prod(sizes.values())
    return PaperStep(
        held=memory.held / cut,
        temporary=temporary,
        sent=_sent(planned, network, shape, tokens),
        flops=flops * stage.batch_size * stage.sequence_length / devices,
    )


def _layers(network: Network) -> int:
    return sum(leaf.size for path, leaf in flatten(network.shapes).items() if path.startswith("layers/"))


def _sent(planned: PlannedStage, network: Network, shape: MeshShape, tokens: int) -> dict[str, float]:
    """Bytes that one device sends in a step, by axis."""
    stage, config, item = planned.stage, network.config, planned.precision.dtype.itemsize
    fsdp = shape.fsdp or 1
    every = sum(leaf.size for leaf in flatten(network.shapes).values())
    trained = sum(leaf.size for path, leaf in flatten(network.shapes).items() if planned.method.trains(path))
    # Weights are gathered for the forward pass and for the backward pass, in the compute type.
    gathered = 2 * item * every / shape.tensor * (fsdp - 1) / fsdp * stage.accumulate
    scattered = 4 * trained / shape.tensor * (fsdp - 1) / fsdp * stage.accumulate
    averaged = 2 * (shape.replica - 1) / shape.replica * 4 * trained / (fsdp * shape.tensor) * stage.accumulate
    # Attention's and the feed-forward's outputs are summed over `tensor`, and so are their inputs' gradients; computed
    # again with rematerialisation.
    sums = 2 * (3 if stage.remat is not None else 2) * config.num_layers * item * tokens * config.hidden_size
    summed = 2 * (shape.tensor - 1) / shape.tensor * sums * stage.accumulate
    # Keys and values are gathered along the row, and their gradients scattered; weights' gradients are summed too.
    heads = [config.heads_of(kind) for kind in config.kind_of_layer if kind.attends]
    numbers = sum(each.groups * (each.keys + each.values) for each in heads)
    keys = item * numbers * tokens * shape.context / shape.tensor
    passes = (3 if stage.remat is not None else 2) * stage.accumulate
    of_rows = (shape.context - 1) / shape.context * (keys * passes + 2 * 4 * trained / (fsdp * shape.tensor))
    sent = {"fsdp": gathered + scattered, "replica": averaged, "tensor": summed, "context": of_rows}
    return {axis: count for axis, count in sent.items() if getattr(shape, axis) not in (None, 1)}
