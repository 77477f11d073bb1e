"""The layers' stack in several parts: some layers train and others do not, though each kind of weight is one stack.

Each group is a subtree ("layers/added_0/attention/q/kernel") that the decoder runs after the one before it, so that
freezing is by path, as everywhere: a frozen group has no gradient and no optimizer state, and no stack is ever copied.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpt_jax.core.lazy import LazyArray, Slices, stacked
from cpt_jax.core.tree import Tree, flatten, unflatten

# (name, number of layers) of each group, from the first layer to the last.
LayerGroups = tuple[tuple[str, int], ...]
# Of each layer of a stack: which leaf it comes from, and its number there; no leaf: zeros.
_Sources = Sequence[tuple[Any, int]]


def split_layers(weights: Tree, groups: LayerGroups) -> Tree:
    """Whole stacks in groups; nothing is read."""
    if not groups:
        return weights
    flat: dict[str, Any] = {}
    for path, leaf in flatten(weights).items():
        if not path.startswith("layers/"):
            flat[path] = leaf
            continue
        first = 0
        for name, count in groups:
            flat[f"layers/{name}/{path.removeprefix('layers/')}"] = _stack([(leaf, first + i) for i in range(count)])
            first += count
    return unflatten(flat)


def join_layers(weights: Tree, groups: LayerGroups) -> Tree:
    """The inverse of `split_layers`."""
    if not groups:
        return weights
    flat: dict[str, Any] = {}
    sources: dict[str, list[tuple[Any, int]]] = {}
    given, (first, _) = flatten(weights), groups[0]
    for path, leaf in given.items():
        if not path.startswith("layers/"):
            flat[path] = leaf
        elif path.startswith(f"layers/{first}/"):
            inner = path.removeprefix(f"layers/{first}/")
            parts = [(given[f"layers/{name}/{inner}"], count) for name, count in groups]
            sources[f"layers/{inner}"] = [(part, number) for part, count in parts for number in range(count)]
    return unflatten(flat | {path: _stack(layers) for path, layers in sources.items()})


def with_copies(weights: Tree, order: Sequence[tuple[int, bool]]) -> Tree:
    """Whole stacks of other layers: each a layer of the given ones, and whether it is a copy that adds nothing to the
    residual stream yet, as its output projections are zero."""
    flat = flatten(weights)
    for path, leaf in flat.items():
        if path.startswith("layers/"):
            zero = path.startswith(("layers/attention/o/", "layers/mlp/down/", "layers/mlp/shared/down/"))
            flat[path] = _stack([(None if copy and zero else leaf, number) for number, copy in order], like=leaf)
    return unflatten(flat)


def without_group(path: str, groups: Sequence[str]) -> str:
    """A path as it is where the stack is whole."""
    first, _, rest = path.partition("/")
    group, _, inner = rest.partition("/")
    return f"layers/{inner}" if first == "layers" and group in groups else path


def _stack(sources: _Sources, like: Any = None) -> LazyArray:
    leaves = [leaf for leaf, _ in sources if leaf is not None] or [like]
    dtype = np.dtype(leaves[0].dtype)
    for leaf in leaves:
        dtype = np.promote_types(dtype, leaf.dtype)

    def read(slices: Slices, wanted: np.dtype) -> np.ndarray:
        def layer(index: tuple[int, ...], inner: Slices) -> np.ndarray:
            leaf, number = sources[index[0]]
            if leaf is None:
                return np.zeros([each.stop - each.start for each in inner], wanted)
            return np.asarray(leaf[(number, *inner)])

        return stacked(slices, 1, wanted, layer)

    return LazyArray((len(sources), *leaves[0].shape[1:]), dtype, read, getattr(leaves[0], "row_axis", None))
