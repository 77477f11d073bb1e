"""Hardware by name, here or not: its devices, as the compiler takes them."""

import dataclasses
import functools
import importlib.util
import math
import os
import re
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from cpt_jax.core.errors import UserError
from cpt_jax.plan.gpus import gpus
from cpt_jax.sharding.hardware import Chip, chip, peak_flops

# The most chips of a slice; how many of Google's count a chip ("v5p-128" are 128 TensorCores, 64 chips); along how many
# axes chips are neighbours; the multiple of chips from which an axis of the torus is closed to a ring.
TPUS = {"v4": (4096, 2, 3, 4), "v5e": (256, 1, 2, 16), "v5p": (6144, 2, 3, 4), "v6e": (256, 1, 2, 16)}
# GPUs by name; as many make an island, which talks over NVLink, or over PCIe where there is none.
GPUS = {
    "t4": "Tesla T4",
    "l4": "NVIDIA L4",
    "a100": "NVIDIA A100",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
}
ISLAND = 8
EXAMPLES = "v5e-256, v5p:4x4x8 (chips along each side), v5e-256x2 (two slices), h100-64, cpu-8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """A number of equal devices.

    Args:
      kind: as JAX names the device.
      sides: of a TPU's torus, in chips.
      slices: of TPUs, which talk over the data centre's network.
    """

    name: str
    platform: Literal["cpu", "gpu", "tpu"]
    kind: str
    chips: int
    generation: str = ""
    sides: tuple[int, ...] = ()
    slices: int = 1

    @property
    def chip(self) -> Chip | None:
        return chip(self.kind)

    def peak_flops(self, compute: str) -> float | None:
        """Of a device's products of a type, FLOP/s."""
        return peak_flops(self.kind, compute)

    def devices(self) -> list[Any]:
        """The devices to compile for, described by the platform's own compiler.

        Raises:
          UserError: the compiler is not installed, or it knows no such slice; fewer CPU devices than asked for.
        """
        if self.platform == "cpu":
            return _cpus(self)
        return list(_tpus(self) if self.platform == "tpu" else gpus(self.generation, self.chips))

    def bandwidth(self, mesh: Mesh, axes: tuple[str, ...]) -> float:
        """Bytes/s that a device can send along axes of a mesh, in a ring.

        In a torus: in both directions of every side along which the axes' devices lie, in one where the side is not
        closed. Beyond an island or slice: the network.
        """
        here = self.chip
        if here is None:
            return math.inf
        sizes = [mesh.shape[name] if name in axes else 1 for name in mesh.axis_names]
        group = mesh.devices[tuple(slice(size) for size in sizes)].ravel()
        if self.platform == "gpu":
            places = {device.id // ISLAND for device in group}
            return here.link_bandwidth if len(places) == 1 else here.network_bandwidth
        if len({getattr(device, "slice_index", 0) or 0 for device in group}) > 1:
            return here.network_bandwidth
        lanes, closed = 0, TPUS[self.generation][3]
        for side, length in enumerate(self.sides):
            reached = len({device.coords[side] for device in group})
            if reached > 1:
                lanes += 2 if reached == length and length % closed == 0 else 1
        return here.link_bandwidth * max(1, lanes)


def hardware_named(name: str) -> Hardware:
    """Of a name like "v5p-128", Google's or a maker's, or "v5e:16x16".

    Raises:
      UserError: there is no such hardware, or not so much of it.
    """
    found = re.fullmatch(r"([a-z]+\d*[a-z]*)(?:-(\d+)|:(\d+(?:x\d+)+))(?:x(\d+))?", name.lower())
    if found is None or found.group(1) not in (*TPUS, *GPUS, "cpu"):
        kinds = ", ".join((*TPUS, *GPUS, "cpu"))
        raise UserError(f"hardware {name!r} is not known: kinds are {kinds}; write it as in {EXAMPLES}")
    family, count = found.group(1), int(found.group(2) or 0)
    if family in TPUS:
        return _tpu(name, family, count, found.group(3), int(found.group(4) or 1))
    if count < 1 or found.group(4):
        raise UserError(f"hardware {name!r}: give the number of devices, as in {family}-8")
    if family == "cpu":
        return Hardware(name=name, platform="cpu", kind="cpu", chips=count)
    if count > ISLAND and count % ISLAND:
        raise UserError(f"hardware {name!r}: {family} come in machines of {ISLAND}: give a multiple, or fewer")
    return Hardware(name=name, platform="gpu", kind=GPUS[family], chips=count, generation=family)


def _tpu(name: str, family: str, count: int, sides: str | None, slices: int) -> Hardware:
    most, per_chip, dimensions, _ = TPUS[family]
    chips, rest = divmod(count, per_chip)
    lengths = tuple(int(side) for side in sides.split("x")) if sides else _sides(chips, dimensions)
    chips = math.prod(lengths)
    if rest or chips < 1 or chips > most or len(lengths) != dimensions:
        counted = "TensorCores, two a chip" if per_chip == 2 else "chips"
        example = f"{family}:" + "x".join("4" * dimensions)
        raise UserError(
            f"hardware {name!r}: there is no such slice; {family}-N counts {counted}, at most {most * per_chip}, or give the sides in chips, as in {example}"
        )
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
    return Hardware(
        name=name,
        platform="tpu",
        kind=kinds[family],
        chips=chips * slices,
        generation=family,
        sides=lengths,
        slices=slices,
    )


def _sides(chips: int, dimensions: int) -> tuple[int, ...]:
    """The most cubic torus of powers of two; of a number that is none, nothing."""
    if chips < 1 or chips & (chips - 1):
        return ()
    sides = [1] * dimensions
    while math.prod(sides) < chips:
        # The last of the shortest: 2 x 2 x 1, then 2 x 2 x 2, and larger ones as 4 x 4 x 8.
        shortest = min(sides)
        sides[max(axis for axis, side in enumerate(sides) if side == shortest)] *= 2
    return tuple(sorted(sides, reverse=True)) if math.prod(sides) < 8 else tuple(sorted(sides))


@functools.lru_cache(maxsize=8)
def _tpus(hardware: Hardware) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"hardware {hardware.name!r} is compiled for by libtpu, which is not installed: pip install 'jax[tpu]=={jax.__version__}' (Linux; no TPU needed)"
        )
    import libtpu  # pyright: ignore[reportMissingImports]
    from jax.experimental import topologies

    # Or libtpu looks for a TPU, and asks Google's servers what machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_LIBRARY_PATH", libtpu.get_library_path())
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5e-1")
    # No device is taken: plans may run beside each other, and beside a run.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name = f"{hardware.generation}:" + "x".join(map(str, hardware.sides))
    options: dict[str, Any] = {"num_slices": hardware.slices} if hardware.slices > 1 else {}
    if hardware.generation == "v4":
        # Two TensorCores as one device, which is how a v4 runs.
        options["chip_config_name"] = "megacore"
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:
        first = str(error).splitlines()[0]
        raise UserError(f"hardware {hardware.name!r}: libtpu has no such slice as {name} ({first})") from error
    return tuple(topology.devices)


def prepare(hardware: Hardware) -> None:
    """Has JAX start with as many CPU devices as stand for the hardware, and look for no other; for a process that does
    nothing else, before JAX has looked."""
    jax.config.update("jax_platforms", "cpu")
    # Without the hardware its programs can be kept, but not read back.
    jax.config.update("jax_enable_compilation_cache", False)
    if hardware.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", hardware.chips)


def _cpus(hardware: Hardware) -> list[Any]:
    devices = jax.devices("cpu")
    if len(devices) < hardware.chips:
        raise UserError(
            f"hardware {hardware.name!r} stands for {hardware.chips} devices, and JAX was started with {len(devices)}: set XLA_FLAGS=--xla_force_host_platform_device_count={hardware.chips}"
        )
    return devices[: hardware.chips]
