"""The layers' stack in several parts: some layers train and others do not, though each kind of weight is one stack.

Each group is a subtree ("layers/added_0/attention/q/kernel") that the decoder runs after the one before it, so that
freezing is by path, as everywhere: a frozen group has no gradient and no optimizer state, and no stack is ever copied.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpt_jax.core.lazy import LazyArray, Slices, stacked
from cpt_jax.core.tree import Tree, flatten, unflatten
from cpt_jax.models.linear import LAYER_SCALAR

# (name, number of layers) of each group, from the first layer to the last.
LayerGroups = tuple[tuple[str, int], ...]
# Of each layer of a stack: which leaf it comes from, and its number there; no leaf: one number.
_Sources = Sequence[tuple[Any, int]]


def split_layers(weights: Tree, config) -> Tree:
    """Whole stacks in the groups of a DecoderConfig; nothing is read."""
    if not config.layer_groups:
        return weights
    flat: dict[str, Any] = {}
    for path, leaf in flatten(weights).items():
        if not path.startswith("layers/"):
            flat[path] = leaf
            continue
        inner, first = path.removeprefix("layers/"), 0
        layers = config.layers_with(inner)
        for name, count in config.layer_groups:
            held = [place for place, layer in enumerate(layers) if first <= layer < first + count]
            if held:
                flat[f"layers/{name}/{inner}"] = _stack([(leaf, place) for place in held])
            first += count
    return unflatten(flat)


def join_layers(weights: Tree, groups: LayerGroups) -> Tree:
    """The inverse of `split_layers`."""
    if not groups:
        return weights
    given = flatten(weights)
    flat = {path: leaf for path, leaf in given.items() if not path.startswith("layers/")}
    names = [name for name, _ in groups]
    for whole in dict.fromkeys(without_group(path, names) for path in given if path not in flat):
        inner = whole.removeprefix("layers/")
        parts = [part for name in names if (part := given.get(f"layers/{name}/{inner}")) is not None]
        flat[whole] = _stack([(part, place) for part in parts for place in range(part.shape[0])])
    return unflatten(flat)


def with_copies(weights: Tree, config, order: Sequence[tuple[int, bool]]) -> Tree:
    """Whole stacks of other layers: each a layer of the DecoderConfig's, and whether it is a copy that adds nothing to
    the residual stream yet, as what comes last in each of its branches is zero."""
    flat = flatten(weights)
    for path, leaf in flat.items():
        if path.startswith("layers/"):
            places = {layer: place for place, layer in enumerate(config.layers_with(path.removeprefix("layers/")))}
            of_copies = _of_copies(path, config)
            other = of_copies is not None
            kept = [(None if copy and other else leaf, places[layer]) for layer, copy in order if layer in places]
            flat[path] = _stack(kept, like=leaf, filled=of_copies)
    return unflatten(flat)


def _of_copies(path: str, config) -> float | None:
    """What a weight of a copy that adds nothing is filled with; None: it is its original's.

    Zero is the norm behind a branch, where there is one: in front of it, where a norm's slope is up to
    1 / sqrt(epsilon), a first step would be far too long. Otherwise the output projection, and of two in a row the last
    alone, or neither would have a gradient."""
    *_, module, leaf = path.split("/")
    if path.endswith(LAYER_SCALAR):
        # Its factor of the whole stream is one.
        return 1.0
    if config.norm_placement in ("after", "both"):
        if module not in ("attention_out_norm", "mlp_out_norm"):
            return None
        return -config.norm_offset if leaf == "scale" and config.norm == "rms" else 0.0
    latent = config.experts is not None and config.experts.latent_size is not None
    if latent and path.startswith(f"layers/{config.experts_name}/down/"):
        return None
    return 0.0 if module in ("o", "down", "latent_out") else None


def without_group(path: str, groups: Sequence[str]) -> str:
    """A path as it is where the stack is whole."""
    first, _, rest = path.partition("/")
    group, _, inner = rest.partition("/")
    return f"layers/{inner}" if first == "layers" and group in groups else path


def _stack(sources: _Sources, like: Any = None, filled: float | None = None) -> LazyArray:
    leaves = [leaf for leaf, _ in sources if leaf is not None] or [like]
    dtype = np.dtype(leaves[0].dtype)
    for leaf in leaves:
        dtype = np.promote_types(dtype, leaf.dtype)

    def read(slices: Slices, wanted: np.dtype) -> np.ndarray:
        def layer(index: tuple[int, ...], inner: Slices) -> np.ndarray:
            leaf, number = sources[index[0]]
            if leaf is None:
                return np.full([each.stop - each.start for each in inner], filled, wanted)
            return np.asarray(leaf[(number, *inner)])

        return stacked(slices, 1, wanted, layer)

    return LazyArray((len(sources), *leaves[0].shape[1:]), dtype, read, getattr(leaves[0], "row_axis", None))
