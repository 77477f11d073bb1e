"""The mesh of devices."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from cpt_jax.core.errors import UserError

AXES = ("replica", "fsdp", "expert", "tensor")


def make_mesh(
    devices: Sequence[Any] | None = None,
    *,
    replica: int = 1,
    fsdp: int | None = None,
    expert: int = 1,
    tensor: int = 1,
) -> Mesh:
    """A mesh (replica, fsdp, expert, tensor) over all devices; `fsdp` takes those the others leave.

    Axes are Auto: the compiler propagates shardings from the arguments' and the constraints in the model.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    fsdp = len(devices) // (replica * expert * tensor) if fsdp is None else fsdp
    sizes = dict(zip(AXES, (replica, fsdp, expert, tensor), strict=True))
    if math.prod(sizes.values()) != len(devices):
        shown = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            f"mesh {shown} does not cover {len(devices)} devices: choose sizes whose product is {len(devices)}"
        )
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * len(AXES))
