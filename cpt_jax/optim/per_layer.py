"""Optimizers that look at a whole matrix, on the matrices of leaves that stack them by layer (and by expert)."""

from collections.abc import Hashable
from typing import Any

import jax
import optax

from cpt_jax.optim.groups import stacked_axes


def per_layer(inner: optax.GradientTransformation, leaves: dict[str, Any]) -> optax.GradientTransformation:
    """`inner` on each layer's matrix or vector, as if it were a leaf of its own.

    A loop over leading axes (`jax.vmap`), not a reshape: axes that are cut over devices stay cut.

    Args:
      inner: must keep what belongs to a weight under the weight's path, and nothing else under a path.
      leaves: all that it will be applied to, by path.
    """
    depth = {path: stacked_axes(path, leaf.ndim) for path, leaf in leaves.items()}
    transforms: dict[Hashable, optax.GradientTransformation] = {}
    for axes in sorted(set(depth.values())):
        transform = inner
        for _ in range(axes):
            transform = _mapped(transform)
        transforms[str(axes)] = transform

    def labels(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda keys, _: str(depth["/".join(key.key for key in keys)]), tree)

    return optax.partition(transforms, labels)


def _mapped(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` over the first axis of every leaf; its counters, which belong to no weight, stay single."""

    def axes(state: Any) -> Any:
        def axis(keys: tuple, _leaf: Any) -> int | None:
            return 0 if any(isinstance(key, jax.tree_util.DictKey) for key in keys) else None

        return jax.tree_util.tree_map_with_path(axis, state)

    def init(params: Any) -> Any:
        return jax.vmap(inner.init, out_axes=axes(jax.eval_shape(inner.init, params)))(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        mapped = jax.vmap(inner.update, in_axes=(0, axes(state), 0), out_axes=(0, axes(state)))
        return mapped(updates, state, params)

    return optax.GradientTransformation(init, update)
