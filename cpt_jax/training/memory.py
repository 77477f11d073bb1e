"""What a stage takes in memory, on paper: before anything is placed or compiled."""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.tree import Tree, flatten, partition, unflatten
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.cross_entropy import chunk_tokens
from cpt_jax.models.decoder import Network
from cpt_jax.models.quantised import quantise
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import Optimizer
from cpt_jax.training.activations import activation_bytes
from cpt_jax.training.flops import first_to_train
from cpt_jax.training.retention import Retention, start_of


class StageMemory(NamedTuple):
    """Bytes, of all devices together.

    weights: what trains in float32, the rest in the compute type or in fewer bits; optimizer: its state; average: the EMA's, unless it
    lies in the host's memory; start: what retention keeps of the start; gradients: of what trains, float32;
    activations: what the layers keep for the backward pass, with the model's rematerialisation; logits: of one chunk of
    tokens, with their gradient.
    """

    weights: int
    optimizer: int
    average: int
    start: int
    gradients: int
    activations: int
    logits: int

    @property
    def held(self) -> int:
        """Between steps."""
        return self.weights + self.optimizer + self.average + self.start

    @property
    def temporary(self) -> int:
        """At most, within a step: all activations are there before the first gradient is, and the logits go first."""
        return self.activations + max(self.gradients, self.logits)


def stage_memory(
    network: Network,
    trains: Callable[[str], bool],
    optimizer: Optimizer,
    *,
    ema: EMA | None = None,
    retention: Sequence[Retention] = (),
    precision: Precision,
    rows: int = 0,
    sequence_length: int = 0,
    scores: bool = False,
    tensor: int = 1,
) -> StageMemory:
    """The memory of a stage whose step, or part of a step, takes `rows` rows of `sequence_length` tokens.

    Args:
      scores: the reference attention keeps all weights of its softmax; kernels keep a number a query.
      tensor: devices among which each layer is cut; the activations are those of one of them.
    """
    trainable, frozen = partition(network.shapes, trains)
    weights = sum(4 * leaf.size for leaf in flatten(trainable).values())
    weights += sum(_frozen_bytes(path, leaf, precision) for path, leaf in flatten(frozen).items())
    size = sum(leaf.size for leaf in flatten(trainable).values())
    state = jax.eval_shape(optimizer.build(trainable).init, _in_float32(trainable))
    start = jax.eval_shape(lambda weights: start_of(weights, retention), trainable)
    tokens, begins = rows * sequence_length, first_to_train(network, trains)
    a_token = activation_bytes(network, begins, precision.dtype.itemsize, sequence_length if scores else 0, tensor)
    return StageMemory(
        weights=weights,
        optimizer=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        average=0 if ema is None or ema.on_host else 4 * size,
        start=sum(4 * leaf.size for leaf in jax.tree.leaves(start)),
        gradients=4 * size,
        activations=round(tokens * a_token),
        logits=_logit_bytes(network.config, tokens, precision.dtype.itemsize),
    )


def _frozen_bytes(path: str, leaf: jax.ShapeDtypeStruct, precision: Precision) -> int:
    kept: Any = jax.ShapeDtypeStruct(leaf.shape, precision.dtype_of(path))
    if precision.frozen_kernels != "as computed" and path.endswith("/kernel"):
        kept = jax.eval_shape(functools.partial(quantise, kind=precision.frozen_kernels), kept)
    # Two numbers of 4 bits are a byte.
    bits = [
        (each.size, 4 if each.dtype.name.endswith("int4") else 8 * each.dtype.itemsize)
        for each in jax.tree.leaves(kept)
    ]
    return sum(size * width for size, width in bits) // 8


def _in_float32(trainable: Tree) -> Tree:
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for path, leaf in flatten(trainable).items()}
    return unflatten(shapes)


def _logit_bytes(config: DecoderConfig, tokens: int, item: int) -> int:
    """Of a chunk: logits, their exponentials, and their gradient."""
    vocabulary = sum(config.padded(rows) for rows in config.table_rows.values())
    return min(tokens, chunk_tokens(vocabulary)) * (8 + item) * vocabulary


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had no room, for a program or for what it was given."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def told_of_memory(name: str, memory: Callable[[], StageMemory]) -> Iterator[None]:
    """What a device has no room for is said in a line, with what the stage takes on paper.

    Raises:
      UserError: there was no room.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        paper, devices = memory(), jax.device_count()
        asked = re.search(r"allocate ([\d.]+ ?[KMGT]?i?B)", str(error))
        piece = f" ({asked[1]} more were asked for)" if asked else ""
        raise UserError(
            f"{name}: a device's memory of {device_memory() / 1e9:.1f} GB is full{piece}; on paper the stage holds"
            f" {paper.held / 1e9:.1f} GB and takes {paper.temporary / 1e9:.1f} GB within a step"
            f"{f', over {devices} devices' if devices > 1 else ''}: give it a smaller batch_size, the same batch in parts"
            " (accumulate), remat (--stages.N.remat products, or all), LoRA instead of full training, or more devices (cpt plan says what fits)"
        ) from error


def accelerator_memory() -> int | None:
    """Bytes that the first device gives to programs; None of a CPU, and of what does not tell."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return stats.get("bytes_limit") if stats else None


def device_memory() -> int:
    """`accelerator_memory`; where there is none, what is free in the host's memory."""
    return accelerator_memory() or host_memory()


def host_memory() -> int:
    """Bytes that are free in the host's memory."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
