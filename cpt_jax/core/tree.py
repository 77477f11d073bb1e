"""Trees of weights: nested dicts with string keys, whose leaves have paths like "layers/attention/q/kernel"."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cpt_jax.core.errors import UserError

Tree = dict[str, Any]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by path, in the tree's order."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, path + "/")
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def partition(tree: Tree, trains: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Two trees without each other's leaves: those whose path `trains`, and the rest."""
    flat = flatten(tree)
    chosen = {path for path in flat if trains(path)}
    return (
        unflatten({path: leaf for path, leaf in flat.items() if path in chosen}),
        unflatten({path: leaf for path, leaf in flat.items() if path not in chosen}),
    )


def combine(first: Tree, second: Tree) -> Tree:
    """One tree of both trees' leaves, which must be different ones (ValueError otherwise)."""
    a, b = flatten(first), flatten(second)
    if clash := a.keys() & b.keys():
        raise ValueError(f"both trees have {', '.join(sorted(clash))}")
    return unflatten(a | b)


def match(patterns: Iterable[str], paths: Iterable[str]) -> set[str]:
    """The paths that at least one glob pattern matches whole.

    Raises:
      UserError: a pattern matches nothing.
    """
    names = list(paths)
    matched: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise UserError(f"pattern {pattern!r} matches no weight; there are: {', '.join(names)}")
        matched |= set(found)
    return matched
