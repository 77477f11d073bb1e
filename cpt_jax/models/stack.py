"""The decoder's blocks as one stack, or as a stack for each group of layers, and how they run one after another."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from cpt_jax.models.attention import GlobalAttention
from cpt_jax.models.kernels.cached import KeyCache
from cpt_jax.models.latent_attention import LatentAttentionConfig
from cpt_jax.models.layers import Block, mixer_of
from cpt_jax.models.linear import LoRAConfig
from cpt_jax.models.quantised import OfStack
from cpt_jax.models.side_by_side import SideBySideConfig

# By the mixer's name: what its layers know of the tokens before, with those layers as first axis; keys and values as a
# `KeyCache`.
Caches = dict[str, Any]


class LayerInputs(NamedTuple):
    """What a block is given besides x: its cache (or keys and values of another layer, where it has none), the number
    of its kind (None where all are of one), and what `run_blocks` was given for it."""

    cache: Any
    kind: Any
    own: Any


Call = Callable[[Block, Array, LayerInputs], tuple[Array, Any, Any]]


def stacked_blocks(config, lora: LoRAConfig | None, rngs: nnx.Rngs) -> Any:
    """All blocks of a DecoderConfig; by the group's name, where it has groups. Of layers that mix tokens in different
    ways, each way is a stack of its own, and the rest is one; the first layers without experts are another such stack,
    "dense", and those that share keys and values, "sharing"."""

    def stack(count: int, make: Callable[[nnx.Rngs], nnx.Module]) -> Any:
        @nnx.split_rngs(splits=count)
        @nnx.vmap(in_axes=0, out_axes=0, axis_size=count)
        def made(rngs: nnx.Rngs) -> nnx.Module:
            return make(rngs)

        return made(rngs)

    def blocks(mixers: Sequence[str], section: str) -> Block:
        first, *others = dict.fromkeys(mixers)
        if not others:
            return stack(len(mixers), lambda rngs: Block(config, lora, rngs, first, section))
        whole = stack(len(mixers), lambda rngs: Block(config, lora, rngs, None, section))
        for name in (first, *others):
            mixer = lambda rngs, name=name: mixer_of(name, config, lora, rngs, section)  # noqa: E731
            setattr(whole, name, stack(mixers.count(name), mixer))
        return whole

    def every(first: int, last: int) -> Any:
        parts = _sections(config, first, last)
        made = {name: blocks([config.layer_mixers[n] for n in layers], name) for name, layers in parts.items()}
        whole: Any = made.pop("") if "" in made else nnx.Dict()
        for name, part in made.items():
            setattr(whole, name, part)
        return whole

    if not config.layer_groups:
        return every(0, config.num_layers)
    return nnx.Dict({name: every(first, last) for name, first, last in _groups(config)})


def empty_caches(config, batch: int, length: int, dtype) -> Caches:
    """Of layers that have seen nothing, with room for rows of `length` tokens."""
    found: Caches = {}
    for kind in config.layer_kinds:
        name, own = kind.mixer_name, config.num_layers - config.sharing_layers
        counted = config.layer_mixers[:own].count(name)
        heads, keys = config.heads_of(kind), None
        if kind.attends and not isinstance(kind.mixer, LatentAttentionConfig):
            keys = KeyCache.empty(counted, batch, heads.groups, length, (heads.keys, heads.keys), dtype)
        if kind.mixer is None or isinstance(kind.mixer, GlobalAttention):
            found[name] = keys
        elif isinstance(kind.mixer, LatentAttentionConfig):
            found[name] = kind.mixer.empty_cache(counted, batch, length, dtype)
        elif isinstance(kind.mixer, SideBySideConfig):
            found[name] = (keys, kind.mixer.mamba2.empty_cache(config.hidden_size, counted, batch, dtype))
        else:
            found[name] = kind.mixer.empty_cache(config.hidden_size, counted, batch, dtype)
    return found


def run_blocks(
    config, blocks: Any, x: Array, inputs: Any, caches: Caches | None, call: Call
) -> tuple[Array, Caches | None, Any]:
    """(x after all blocks, the caches, `call`'s third results with the layers that have one as first axis), where `call`
    runs one block and gives (x, its cache, another result or None).

    Args:
      inputs: what each block is given besides: a tree of arrays, with the layers as first axis.
    """
    results, shared = [], {}
    for stack, layers in _stacks(config, blocks):
        part = _cut(inputs, layers.start, layers.stop)
        x, caches, shared, result = _run(config, stack, layers, x, part, caches, shared, call)
        results += [] if result is None else [result]
    return x, caches, _joined(results)


def _stacks(config, blocks: Any) -> Iterator[tuple[Block, range]]:
    """(blocks, their numbers) of each part of the layers that is one loop, from the first to the last."""
    for name, first, last in _groups(config) or [("", 0, config.num_layers)]:
        whole, parts = blocks[name] if name else blocks, _sections(config, first, last)
        stacks = {section: getattr(whole, section) if section else whole for section in parts}
        for section in filter(None, parts):
            # The module is this call's alone.
            delattr(whole, section)
        yield from sorted(((stacks[name], layers) for name, layers in parts.items()), key=lambda part: part[1].start)


def _sections(config, first: int, last: int) -> dict[str, range]:
    """Of the layers from `first` up to `last`, those of each stack that is apart, by its name."""
    cut = {name: range(max(first, of.start), min(last, of.stop)) for name, of in config.sections.items()}
    return {name: layers for name, layers in cut.items() if layers}


def _groups(config) -> list[tuple[str, int, int]]:
    """(name, first layer, the first of the next) of each group."""
    found, first = [], 0
    for name, count in config.layer_groups:
        found.append((name, first, first + count))
        first += count
    return found


def _run(
    config, stack: Block, layers: range, x: Array, inputs: Any, caches: Caches | None, shared: Caches, call: Call
) -> tuple[Array, Caches | None, Caches, Any]:
    """Layers in a loop, whose body is one layer, or as many different ones as come again and again; the caches go along,
    so that they are written where they are.

    `shared`: keys and values that others share where there are no caches, those of each mixer's last layer.
    """
    mixers = config.layer_mixers[layers.start : layers.stop]
    pattern = None if config.layer_pattern is None else config.layer_pattern[layers.start : layers.stop]
    graphdef, weights = nnx.split(stack)
    layer = functools.partial(_layer, graphdef, call)
    if len(set(mixers)) > 1 or config.sharing_layers:
        pattern = pattern or (0,) * len(layers)
        return _run_periods(config, layer, layers, pattern, weights, x, inputs, caches, shared)
    (mixer,) = set(mixers)
    run = _recomputed(config, layer(mixer))
    before = config.layer_mixers[: layers.start].count(mixer)

    def one(carry, given):
        (x, caches), (weights, number, kind, own) = carry, given
        x, (cache, result) = run(x, (weights, LayerInputs(_of_layer(caches, mixer, number), kind, own)))
        return (x, _with_layer(caches, mixer, number, cache)), result

    numbers = None if caches is None else before + jnp.arange(len(layers))
    kinds = None if pattern is None else jnp.asarray(pattern)
    unroll = len(layers) if config.layer_loop == "unroll" else 1
    (x, caches), results = jax.lax.scan(one, (x, caches), (weights, numbers, kinds, inputs), unroll=unroll)
    return x, caches, shared, results


def _layer(graphdef, call: Call, mixer: str, kind: int | None = None) -> Callable[..., Any]:
    """What a loop calls for a layer; `kind`: the number of its kind, where that is a constant."""

    def run(x, given):
        weights, inputs = given
        block = nnx.merge(graphdef, weights)
        block.mixer = mixer
        x, cache, result = call(block, x, inputs if kind is None else inputs._replace(kind=kind))
        return x, (cache, result)

    return run


def _recomputed(config, layer: Callable[..., Any]) -> Callable[..., Any]:
    """A layer that is computed again in the backward pass, as the configuration says."""
    if config.remat is None:
        return layer
    # In a loop nothing can be found to be the same as in the forward pass; unrolled, all of it could.
    return jax.checkpoint(layer, prevent_cse=config.layer_loop == "unroll", policy=config.remat.policy())


def _run_periods(
    config,
    layer: Callable[..., Any],
    layers: range,
    pattern,
    weights,
    x: Array,
    inputs: Any,
    caches: Caches | None,
    shared: Caches,
) -> tuple[Array, Caches | None, Caches, Any]:
    """Layers that mix tokens in different ways: one after the other within a period, the periods in a loop."""
    mixers, size = config.layer_mixers[layers.start : layers.stop], _period(pattern)
    count, own_layers = len(mixers) // size, config.num_layers - config.sharing_layers
    sharing = layers.start >= own_layers

    def period(carry, given):
        (x, caches), (weights, number, inputs) = carry, given
        last, results = {}, []
        for within, mixer in enumerate(mixers[:size]):
            place = mixers[:within].count(mixer)

            def run(x, weights, given, within=within, mixer=mixer, place=place):
                # Of other mixers the first layer's weights go along unread.
                places = {name: place if name == mixer else 0 for name in mixers}
                own = {name: _layer_of(part, places.get(name, within)) for name, part in weights.items()}
                return layer(mixer, pattern[within])(x, (nnx.State(own), given))

            if sharing:
                at = config.layer_mixers[:own_layers].count(mixer) - 1
            elif caches is not None:
                before = config.layer_mixers[: layers.start].count(mixer)
                at = before + number * mixers[:size].count(mixer) + place
            else:
                at = None
            cache = shared[mixer] if sharing and caches is None else _of_layer(caches, mixer, at)
            given = LayerInputs(cache, None, _at(inputs, within))
            x, (cache, result) = _recomputed(config, run)(x, weights, given)
            results += [] if result is None else [result]
            if not sharing:
                caches, last[mixer] = _with_layer(caches, mixer, at, cache), cache
        return (x, caches), ({} if caches is not None else last, _stacked(results))

    in_periods = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), (dict(weights), inputs))
    numbers = None if caches is None else jnp.arange(count)
    given = in_periods[0], numbers, in_periods[1]
    unroll = count if config.layer_loop == "unroll" else 1
    (x, caches), (last, results) = jax.lax.scan(period, (x, caches), given, unroll=unroll)
    results = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), results)
    return x, caches, shared | _at(last, -1), results


def _of_layer(caches: Caches | None, mixer: str, number: Any) -> Any:
    """The cache of one of the mixer's layers; keys and values stay where they are."""
    if caches is None:
        return None
    return jax.tree.map(
        lambda part: part._replace(layer=number) if isinstance(part, KeyCache) else part[number],
        caches[mixer],
        is_leaf=lambda part: isinstance(part, KeyCache),
    )


def _with_layer(caches: Caches | None, mixer: str, number: Any, cache: Any) -> Caches | None:
    """The caches with this one of that layer."""
    if caches is None:
        return None

    def put(old: Any, new: Any) -> Any:
        return new._replace(layer=None) if isinstance(new, KeyCache) else old.at[number].set(new)

    return caches | {mixer: jax.tree.map(put, caches[mixer], cache, is_leaf=lambda part: isinstance(part, KeyCache))}


def _period(pattern: Sequence[int]) -> int:
    """Of the kinds of layers: after how many they come again, up to the last."""
    count = len(pattern)
    return next(
        size
        for size in range(1, count + 1)
        if count % size == 0 and all(pattern[n] == pattern[n % size] for n in range(count))
    )


def _cut(tree: Any, first: int, last: int) -> Any:
    return jax.tree.map(lambda array: array if (first, last) == (0, len(array)) else array[first:last], tree)


def _at(tree: Any, number: int) -> Any:
    return jax.tree.map(lambda array: array[number], tree)


def _layer_of(weights: Any, number: int) -> Any:
    """One layer of stacks; its kernels are cut out where they are used, or the backward pass would keep a copy of each."""

    def cut(path: Any, leaf: nnx.Variable) -> nnx.Variable:
        # A weight of the block itself has no path.
        if path and path[-1].key == "kernel":
            return leaf.replace(OfStack(leaf.get_value(), number))
        return leaf.replace(_at(leaf.get_value(), number))

    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return jax.tree_util.tree_map_with_path(cut, weights, is_leaf=is_variable)


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *parts: jnp.stack(parts), *trees) if trees else None


def _joined(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts) if parts[1:] else parts[0], *trees) if trees else None
