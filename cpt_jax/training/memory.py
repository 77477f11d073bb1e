"""What a stage takes in memory, on paper: before anything is placed or compiled."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.tree import Tree, flatten, partition, unflatten
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.cross_entropy import chunk_tokens
from cpt_jax.models.decoder import Network
from cpt_jax.models.remat import Remat
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import Optimizer
from cpt_jax.sharding.hardware import backend
from cpt_jax.training.flops import first_to_train
from cpt_jax.training.retention import Retention, start_of


class StageMemory(NamedTuple):
    """Bytes, of all devices together.

    weights: what trains in float32, the rest in the compute type; optimizer: its state; average: the EMA's, unless it
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
    weights += sum(precision.dtype_of(path).itemsize * leaf.size for path, leaf in flatten(frozen).items())
    size = sum(leaf.size for leaf in flatten(trainable).values())
    state = jax.eval_shape(optimizer.build(trainable).init, _in_float32(trainable))
    start = jax.eval_shape(lambda weights: start_of(weights, retention), trainable)
    tokens, layers = rows * sequence_length, network.config.num_layers - first_to_train(network, trains)
    a_token = _activation_bytes(network, layers, precision.dtype.itemsize, sequence_length if scores else 0, tensor)
    return StageMemory(
        weights=weights,
        optimizer=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        average=0 if ema is None or ema.on_host else 4 * size,
        start=sum(4 * leaf.size for leaf in jax.tree.leaves(start)),
        gradients=4 * size,
        activations=round(tokens * a_token),
        logits=_logit_bytes(network.config, tokens, precision.dtype.itemsize),
    )


def _in_float32(trainable: Tree) -> Tree:
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for path, leaf in flatten(trainable).items()}
    return unflatten(shapes)


def _activation_bytes(network: Network, layers: int, item: int, keys: int, tensor: int) -> float:
    """What so many layers keep of a token, on one of the devices among which each is cut."""
    config = network.config
    residual = _residual_bytes(config)
    # The residual stream is whole on each device.
    a_layer = residual + (_layer_bytes(network, item, keys) - residual) / tensor
    if config.remat is None:
        return layers * a_layer
    # Of each layer what is kept, and of one all, while its gradient is computed.
    return layers * _bytes_with_remat(network, config.remat, item, tensor) + min(1, layers) * a_layer


def _bytes_with_remat(network: Network, remat: Remat, item: int, tensor: int) -> float:
    """What a layer keeps of a token with rematerialisation: its input, and what is named."""
    config = network.config
    queries, groups = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    named = {
        "queries": queries,
        "keys": groups,
        "values": groups,
        "attention_out": queries,
        "mlp_gate": _feed_forward_size(config),
        "mlp_up": _feed_forward_size(config),
    }
    kept = item * sum(named[name] for name in remat.keep)
    if remat.products:
        # Experts' products are none of these, and that of down is only added to the stream; the shared one's is weighted.
        inner = _feed_forward_size(config) * (2 if config.gated else 1)
        inner += config.hidden_size + 1 if _has_shared_expert(config) else 0
        outputs = queries + 2 * groups + config.hidden_size + inner + sum(_ranks(network))
        kept += (4 if backend() == "cpu" else item) * outputs
    return 4 * config.hidden_size + kept / tensor


def _feed_forward_size(config: DecoderConfig) -> int:
    """The inner width of what every token goes through: of experts, the shared one's."""
    return config.intermediate_size if config.experts is None else config.experts.shared_intermediate_size or 0


def _has_shared_expert(config: DecoderConfig) -> bool:
    return config.experts is not None and config.experts.shared_intermediate_size is not None


def _ranks(network: Network) -> list[int]:
    """Of a layer's adapters."""
    return [leaf.shape[-1] for path, leaf in flatten(network.shapes).items() if path.endswith("/lora_a")]


def _residual_bytes(config: DecoderConfig) -> int:
    """The residual stream of a token before attention and feed-forward, float32."""
    return 4 * config.hidden_size * (1 if config.parallel_residual else 2)


def _layer_bytes(network: Network, item: int, keys: int) -> int:
    """What one layer keeps of a token without rematerialisation: see `models.remat.recomputed`."""
    config = network.config
    queries, groups = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    kept = _residual_bytes(config)
    # Queries, keys and values; what the heads mix, as the kernel gives it and as the product takes it.
    kept += item * (queries + 2 * groups + queries)
    kept += item * config.num_heads * keys if keys else 4 * (queries + config.num_heads)
    if config.qk_norm is not None:
        kept += 4 * (queries + groups)
    if config.norm_placement in ("after", "both"):
        kept += 8 * config.hidden_size
    kept += item * _feed_forward_size(config) * (2 if config.gated else 1)
    if config.experts is not None:
        # Nothing of experts is computed again: of each that a token goes through the inputs of gate and up, both of them
        # with three steps of the activation and the product, that rounded, and the result; and the router's input.
        of_expert = (20 + item) * config.intermediate_size + (4 + 2 * item) * config.hidden_size
        kept += config.experts.per_token * of_expert + 4 * config.hidden_size
    if _has_shared_expert(config):
        # What it gives, and its weight.
        kept += 4 * (config.hidden_size + 1)
    # Adapters: the products with A, float32, and rounded.
    return kept + (4 + item) * sum(_ranks(network))


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
            " (accumulate), remat, LoRA instead of full training, or more devices (cpt plan says what fits)"
        ) from error


def device_memory() -> int:
    """Bytes that the first device gives to programs; of a CPU, what is free in the host's memory."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return stats["bytes_limit"] if stats and "bytes_limit" in stats else host_memory()


def host_memory() -> int:
    """Bytes that are free in the host's memory."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
