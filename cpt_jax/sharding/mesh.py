"""The mesh of devices."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
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


def make_mesh(devices: Sequence[Any] | None = None, shape: MeshShape | None = None) -> Mesh:
    """A mesh of `AXES` over all devices, by default all along fsdp.

    Axes are Auto: the compiler propagates shardings from the arguments' and the constraints in the model.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dataclasses.asdict((shape or MeshShape()).over(len(devices)))
    grid = np.asarray(devices).reshape([sizes[name] for name in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
