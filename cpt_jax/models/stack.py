"""The decoder's blocks as one stack, or as a stack for each group of layers, and how they run one after another."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from cpt_jax.models import attention
from cpt_jax.models.layers import Block, mixer_of
from cpt_jax.models.linear import LoRAConfig

# By the mixer's name: what its layers know of the tokens before, with those layers as first axis.
Caches = dict[str, Any]


class LayerInputs(NamedTuple):
    """What a block is given besides x: its cache, the number of its kind (a constant where the layers' mixers differ;
    None where all are of one kind), and `inputs` of its own."""

    cache: Any
    kind: Any
    own: Any


Call = Callable[[Block, Array, LayerInputs], tuple[Array, Any, Any]]


def stacked_blocks(config, lora: LoRAConfig | None, rngs: nnx.Rngs) -> Any:
    """All blocks of a DecoderConfig; by the group's name, where it has groups. Of layers that mix tokens in different
    ways, each way is a stack of its own, and the rest is one."""

    def stack(count: int, make: Callable[[nnx.Rngs], nnx.Module]) -> Any:
        @nnx.split_rngs(splits=count)
        @nnx.vmap(in_axes=0, out_axes=0, axis_size=count)
        def made(rngs: nnx.Rngs) -> nnx.Module:
            return make(rngs)

        return made(rngs)

    def blocks(mixers: Sequence[str]) -> Block:
        first, *others = dict.fromkeys(mixers)
        if not others:
            return stack(len(mixers), lambda rngs: Block(config, lora, rngs, first))
        whole = stack(len(mixers), lambda rngs: Block(config, lora, rngs, None))
        for name in (first, *others):
            setattr(whole, name, stack(mixers.count(name), lambda rngs, name=name: mixer_of(name, config, lora, rngs)))
        return whole

    if not config.layer_groups:
        return blocks(config.layer_mixers)
    return nnx.Dict({name: blocks(config.layer_mixers[first:last]) for name, first, last in _groups(config)})


def empty_caches(config, batch: int, length: int, dtype) -> Caches:
    """Of layers that have seen nothing, with room for rows of `length` tokens."""
    found: Caches = {}
    for kind in config.layer_kinds:
        name, counted = kind.mixer_name, config.layer_mixers.count(kind.mixer_name)
        if kind.mixer is None:
            found[name] = attention.empty_cache(config, counted, batch, length, dtype)
        else:
            found[name] = kind.mixer.empty_cache(config.hidden_size, counted, batch, dtype)
    return found


def run_blocks(
    config, blocks: Any, x: Array, inputs: Any, caches: Caches | None, call: Call
) -> tuple[Array, Caches | None, Any]:
    """(x after all blocks, the caches, `call`'s third results with the layers as first axis), where `call` runs one
    block and gives (x, its cache, another result).

    Args:
      inputs: what each block is given besides: a tree of arrays, with the layers as first axis.
    """
    if not config.layer_groups:
        return _run(config, blocks, range(config.num_layers), x, inputs, caches, call)
    every, results = [], []
    for name, first, last in _groups(config):
        before = config.layer_mixers[:first]
        part = None
        if caches is not None:
            counts = {mixer: (before.count(mixer), config.layer_mixers[:last].count(mixer)) for mixer in caches}
            part = {mixer: _cut(cache, *counts[mixer]) for mixer, cache in caches.items()}
        x, part, result = _run(config, blocks[name], range(first, last), x, _cut(inputs, first, last), part, call)
        every, results = [*every, part], [*results, result]
    return x, None if caches is None else _joined(every), _joined(results)


def _groups(config) -> list[tuple[str, int, int]]:
    """(name, first layer, the first of the next) of each group."""
    found, first = [], 0
    for name, count in config.layer_groups:
        found.append((name, first, first + count))
        first += count
    return found


def _run(
    config, stack: Block, layers: range, x: Array, inputs: Any, caches: Caches | None, call: Call
) -> tuple[Array, Caches | None, Any]:
    """Layers in a loop, whose body is one layer, or as many different ones as come again and again."""
    mixers = config.layer_mixers[layers.start : layers.stop]
    pattern = None if config.layer_pattern is None else config.layer_pattern[layers.start : layers.stop]
    graphdef, weights = nnx.split(stack)
    unrolled = config.layer_loop == "unroll"

    def layer(kind: int | None, mixer: str) -> Callable[..., Any]:
        def run(x, inputs):
            weights, cache, kinds, own = inputs
            block = nnx.merge(graphdef, weights)
            block.mixer = mixer
            x, cache, result = call(block, x, LayerInputs(cache, kinds if kind is None else kind, own))
            return x, (cache, result)

        if config.remat is None:
            return run
        # In a loop nothing can be found to be the same as in the forward pass; unrolled, all of it could.
        return jax.checkpoint(run, prevent_cse=unrolled, policy=config.remat.policy())

    first, *others = dict.fromkeys(mixers)
    if not others:
        kinds = None if pattern is None else jnp.asarray(pattern)
        each = (weights, None if caches is None else caches[first], kinds, inputs)
        x, (cache, result) = jax.lax.scan(layer(None, first), x, each, unroll=len(layers) if unrolled else 1)
        return x, None if caches is None else caches | {first: cache}, result
    assert pattern is not None
    size, known = _period(pattern), caches
    if caches is not None:
        caches = {mixer: caches[mixer] for mixer in (first, *others)}
    # Of each layer of a period, its place among those that have its mixer.
    places = [mixers[:number].count(mixer) for number, mixer in enumerate(mixers[:size])]

    def period(x, inputs):
        weights, caches, own = inputs
        new, results = {mixer: [] for mixer in caches or ()}, []
        for number, (mixer, place) in enumerate(zip(mixers[:size], places, strict=True)):
            # Of other mixers the first layer's weights go along unread.
            one = jax.tree_util.tree_map_with_path(
                lambda path, leaf, number=number, mixer=mixer, place=place: leaf[
                    place if path[0].key == mixer else 0 if path[0].key in mixers else number
                ],
                weights,
            )
            cache = None if caches is None else _at(caches[mixer], place)
            x, (cache, result) = layer(pattern[number], mixer)(x, (one, cache, None, _at(own, number)))
            if caches is not None:
                new[mixer].append(cache)
            results.append(result)
        stacked = None if caches is None else {mixer: _stacked(parts) for mixer, parts in new.items()}
        return x, (stacked, _stacked(results))

    in_periods = jax.tree.map(
        lambda leaf: leaf.reshape(len(layers) // size, -1, *leaf.shape[1:]), (weights, caches, inputs)
    )
    x, outputs = jax.lax.scan(period, x, in_periods, unroll=len(layers) // size if unrolled else 1)
    caches, results = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)
    return x, None if known is None else known | caches, results


def _period(pattern: Sequence[int]) -> int:
    """Of the kinds of layers: after how many they come again, up to the last."""
    count = len(pattern)
    return next(
        size
        for size in range(1, count + 1)
        if count % size == 0 and all(pattern[n] == pattern[n % size] for n in range(count))
    )


def _cut(tree: Any, first: int, last: int) -> Any:
    return jax.tree.map(lambda array: array[first:last], tree)


def _at(tree: Any, number: int) -> Any:
    return jax.tree.map(lambda array: array[number], tree)


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *parts: jnp.stack(parts), *trees)


def _joined(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *trees)
