"""Weights onto devices: each process reads a share of a leaf, and no more."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from cpt_jax.core.lazy import LazyArray


def place(leaf: Any, dtype: Any, sharding: Sharding) -> jax.Array:
    """A leaf (NumPy or lazy) as an array of `dtype`, laid out by `sharding`.

    A lazy leaf is asked once, for the smallest box that holds what this process's devices need. Where that would make
    several processes read the same bytes, because the leaf is cut across the rows of its file, each process reads
    other rows, and the devices exchange them.
    """
    reading = _by_rows(leaf, sharding)
    if reading is None:
        return _read(leaf, dtype, sharding)
    # Only what is as large elsewhere, too, can lie where it lay: of what is copied, JAX would warn.
    held = [math.prod(each.shard_shape(leaf.shape)) for each in (reading, sharding)]
    donated = (0,) if held[0] == held[1] else ()
    return jax.jit(lambda array: array, out_shardings=sharding, donate_argnums=donated)(_read(leaf, dtype, reading))


def spread(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """An array that every process has, each device's part on it."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def _by_rows(leaf: Any, sharding: Sharding) -> NamedSharding | None:
    """All devices along the rows of the file, if there are several processes and the rows can be divided so."""
    if jax.process_count() == 1 or not isinstance(sharding, NamedSharding) or not isinstance(leaf, LazyArray):
        return None
    axis, mesh = leaf.row_axis, sharding.mesh
    if axis is None or leaf.shape[axis] % mesh.size:
        return None
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, mesh.axis_names))


def _read(leaf: Any, dtype: Any, sharding: Sharding) -> jax.Array:
    shape = tuple(leaf.shape)
    wanted = {
        device: tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
        if index is not None
    }
    box = tuple(
        slice(min(each[axis].start for each in wanted.values()), max(each[axis].stop for each in wanted.values()))
        for axis in range(len(shape))
    )
    part = leaf.part(box, dtype) if isinstance(leaf, LazyArray) else np.asarray(leaf)[box].astype(dtype, copy=False)
    pieces = []
    for device, index in wanted.items():
        inner = tuple(slice(i.start - b.start, i.stop - b.start) for i, b in zip(index, box, strict=True))
        # What a lazy leaf made is nobody else's: on a CPU it becomes the array without a copy.
        pieces.append(jax.device_put(part[inner], device, may_alias=isinstance(leaf, LazyArray)))
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)
