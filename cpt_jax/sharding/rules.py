"""Logical axes to mesh axes: the one place that names both."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from cpt_jax.core.tree import Tree

# Weights are cut along `embed` over fsdp and along their wide axis over tensor; activations along the batch and, over
# context, along the sequence.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "fsdp", "expert"),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    # Not cut: a few pieces, a low rank, layers that a scan walks over, activations' own axis.
    "new_vocab": (),
    "rank": (),
    "router": (),
    "layers": (),
    "sequence": ("context",),
    "hidden": (),
}


def parts(mesh: Mesh | AbstractMesh, logical_axis: str) -> int:
    """Into how many a mesh cuts a logical axis that divides."""
    return math.prod(mesh.shape[axis] for axis in RULES[logical_axis])


def partition_spec(logical_axes: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The mesh axes of an array; an axis whose size does not divide stays whole (9 heads over 8 chips)."""
    spec = []
    for name, size in zip(logical_axes, shape, strict=True):
        axes = RULES[name]
        spec.append(axes if axes and size % parts(mesh, name) == 0 else None)
    return PartitionSpec(*spec)


def shardings(logical_axes: Tree, shapes: Tree, mesh: Mesh) -> Tree:
    """A NamedSharding for each leaf of a tree of shapes, from its logical axes."""
    return jax.tree.map(
        lambda leaf, axes: NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh)),
        shapes,
        logical_axes,
        is_leaf=lambda node: isinstance(node, jax.ShapeDtypeStruct | jax.Array),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(array: jax.Array, *logical_axes: str) -> jax.Array:
    """Pins an activation's sharding where a mesh is set (`jax.set_mesh`), or XLA replicates it inside the layers'
    scan."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return array
    return jax.lax.with_sharding_constraint(array, partition_spec(logical_axes, array.shape, mesh))
