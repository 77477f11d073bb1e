"""Weights onto devices: each process reads the part of a leaf that its devices hold, and no more."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding


def place(leaf: Any, dtype: Any, sharding: Sharding) -> jax.Array:
    """A leaf (NumPy or lazy) as an array of `dtype`, laid out by `sharding`.

    A lazy leaf is asked once, for the smallest box that holds what this process's devices need.
    """
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
    part = np.asarray(leaf[box] if shape else leaf).astype(dtype, copy=False)
    pieces = []
    for device, index in wanted.items():
        inner = tuple(slice(i.start - b.start, i.stop - b.start) for i, b in zip(index, box, strict=True))
        pieces.append(jax.device_put(part[inner], device))
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)
