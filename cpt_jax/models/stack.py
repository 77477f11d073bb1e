"""The decoder's blocks as one stack, or as a stack for each group of layers, and how they run one after another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from cpt_jax.models.layers import Block
from cpt_jax.models.linear import LoRAConfig


def stacked_blocks(config, lora: LoRAConfig | None, rngs: nnx.Rngs) -> Any:
    """All blocks of a DecoderConfig; by the group's name, where it has groups."""

    def stack(count: int) -> Block:
        @nnx.split_rngs(splits=count)
        @nnx.vmap(in_axes=0, out_axes=0, axis_size=count)
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, lora, rngs)

        return blocks(rngs)

    if not config.layer_groups:
        return stack(config.num_layers)
    return nnx.Dict({name: stack(count) for name, count in config.layer_groups})


def run_blocks(
    config, blocks: Any, x: Array, inputs: Any, call: Callable[[Block, Array, Any], tuple[Array, Any]]
) -> tuple[Array, Any]:
    """(x after all blocks, `call`'s second results with the layers as first axis), where `call` runs one block.

    Args:
      inputs: what each block is given besides x: a tree of arrays, with the layers as first axis.
    """

    def run(stack: Block, x: Array, inputs: Any, count: int) -> tuple[Array, Any]:
        graphdef, stacked = nnx.split(stack)

        def layer(x, inputs):
            weights, own = inputs
            return call(nnx.merge(graphdef, weights), x, own)

        unrolled = config.layer_loop == "unroll"
        if config.remat is not None:
            # In a loop nothing can be found to be the same as in the forward pass; unrolled, all of it could.
            layer = jax.checkpoint(layer, prevent_cse=unrolled, policy=config.remat.policy())
        return jax.lax.scan(layer, x, (stacked, inputs), unroll=count if unrolled else 1)

    if not config.layer_groups:
        return run(blocks, x, inputs, config.num_layers)
    outputs, first = [], 0
    for name, count in config.layer_groups:
        own = jax.tree.map(lambda array, first=first, last=first + count: array[first:last], inputs)
        x, output = run(blocks[name], x, own, count)
        outputs, first = [*outputs, output], first + count
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
