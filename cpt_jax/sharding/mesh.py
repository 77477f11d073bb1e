"""The mesh of devices."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from cpt_jax.core.errors import UserError

# From the axis whose devices may be furthest apart to that whose talk most.
AXES = ("replica", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices each axis has; `fsdp` takes those that the others leave.

    replica: whole copies of the weights, each with its own rows. fsdp: weights, and rows, cut. expert: rows, and the
    experts of a mixture, cut. context: the tokens of a row, cut. tensor: heads, feed-forwards and vocabulary, cut.
    """

    replica: int = 1
    fsdp: int | None = None
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if size is not None and size < 1:
                raise UserError(f"mesh axis {name} is {size}: give at least 1")

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Of a text like "fsdp=4,tensor=2".

        Raises:
          UserError: it is none.
        """
        sizes = {}
        for part in text.split(","):
            name, _, size = part.strip().partition("=")
            if name not in AXES or not size.isdecimal():
                raise UserError(f"mesh {text!r}: {part.strip()!r} is no axis=size; axes are {', '.join(AXES)}")
            sizes[name] = int(size)
        return cls(**sizes)

    def __str__(self) -> str:
        return " x ".join(f"{name} {getattr(self, name)}" for name in AXES)

    def over(self, devices: int) -> "MeshShape":
        """This shape with the size of `fsdp` filled in.

        Raises:
          UserError: the sizes do not multiply to the number of devices.
        """
        others = math.prod(getattr(self, name) for name in AXES if name != "fsdp")
        fsdp = devices // others if self.fsdp is None else self.fsdp
        shape = dataclasses.replace(self, fsdp=fsdp)
        if fsdp * others != devices:
            raise UserError(f"mesh {shape} does not cover {devices} devices: choose sizes whose product is {devices}")
        return shape


def preset(devices: Sequence[Any], rows: int, length: int) -> MeshShape:
    """The shape for steps of `rows` rows of `length` tokens where none is given: a replica for each slice (or all along
    fsdp, where there is one), as much fsdp as the rows divide into, and context for the rest.

    Raises:
      UserError: there are more devices than can be given a part.
    """
    slices = len({_slice(device) for device in devices})
    replica = slices if rows % slices == 0 and len(devices) % slices == 0 else 1
    fsdp = math.gcd(len(devices) // replica, rows // replica)
    context = len(devices) // (replica * fsdp)
    if length % context:
        raise UserError(
            f"{rows} rows of {length} tokens do not divide over {len(devices)} devices: make batch_size a multiple of {len(devices)}, or give --mesh"
        )
    return MeshShape(replica=replica, fsdp=fsdp, context=context)


def make_mesh(devices: Sequence[Any] | None = None, shape: MeshShape | None = None) -> Mesh:
    """A mesh of `AXES` over all devices, by default all along fsdp.

    On TPUs the axes lie along the links, and slices along `replica` where that is a multiple of them. Axes are Auto:
    the compiler propagates shardings from the arguments' and the constraints in the model.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    chosen = (shape or MeshShape()).over(len(devices))
    sizes = [getattr(chosen, name) for name in AXES]
    return Mesh(_grid(devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slice(device: Any) -> int:
    return getattr(device, "slice_index", None) or 0


def _grid(devices: list[Any], sizes: list[int]) -> np.ndarray:
    if devices[0].platform != "tpu" or len(devices) == 1:
        return np.asarray(devices).reshape(sizes)
    slices = len({_slice(device) for device in devices})
    if slices > 1 and sizes[0] % slices == 0:
        across = [slices] + [1] * (len(sizes) - 1)
        within = [sizes[0] // slices, *sizes[1:]]
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    if slices > 1:
        by_slice: list[Any] = sorted(devices, key=lambda device: (_slice(device), device.id))
        return np.asarray(by_slice).reshape(sizes)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
