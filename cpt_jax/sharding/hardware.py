"""What accelerators can do at most, by the names that JAX gives them, and which of them is compiled for."""

import contextlib
import contextvars
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

# Dense bfloat16 products, FLOP/s a device, from the makers' data sheets; T4 and V100, which have none: float16. The
# first pattern that is found in `device_kind` counts.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"B200", 2250e12),
    (r"H200|H100 80GB HBM3|GH200", 989.4e12),
    (r"H100 NVL", 835e12),
    (r"H100", 756e12),
    (r"A100", 312e12),
    (r"A10G", 70e12),
    (r"L40S", 362e12),
    (r"L4\b", 121e12),
    (r"RTX 4090", 165.2e12),
    (r"V100", 125e12),
    (r"T4\b", 65e12),
    (r"TPU ?7x|TPU v7", 2307e12),
    (r"TPU v6", 918e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5", 459e12),
    (r"TPU v4", 275e12),
)


def peak_flops(device_kind: str) -> float | None:
    """A device's peak of bfloat16 products, FLOP/s; None where it is not known (CPUs)."""
    return next((peak for pattern, peak in PEAK_FLOPS if re.search(pattern, device_kind)), None)


class Chip(NamedTuple):
    """What a chip has besides its products.

    memory: bytes; memory_bandwidth: bytes/s; link_bandwidth: bytes/s in one direction, of one link to a neighbour in a
    torus (TPU), or of a device to the switch of its island (GPU); network_bandwidth: bytes/s of a device to others
    beyond its slice or island.
    """

    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float


# TPUs: Google's pages on each version (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e); their interconnect is given for a
# chip, here by its 4 links (v5e, v6e) or 6; network: v5e 6.4 Tbit/s a pod of 256, v6e 25.6, v4 and v5p 200 Gbit/s a host
# of 4 chips. GPUs: NVIDIA's data sheets; network: one 400 Gbit/s (A100: 200) adapter a GPU, as in DGX.
CHIPS: tuple[tuple[str, Chip], ...] = (
    (r"H200", Chip(141e9, 4.8e12, 450e9, 50e9)),
    (r"H100", Chip(80e9, 3.35e12, 450e9, 50e9)),
    (r"A100", Chip(80e9, 2.039e12, 300e9, 25e9)),
    (r"TPU v6", Chip(32 * 2**30, 1.64e12, 100e9, 12.5e9)),
    (r"TPU v5 lite|TPU v5e", Chip(16 * 2**30, 819e9, 50e9, 3.125e9)),
    (r"TPU v5", Chip(95e9, 2.765e12, 100e9, 6.25e9)),
    (r"TPU v4", Chip(32 * 2**30, 1.2e12, 50e9, 6.25e9)),
)


def chip(device_kind: str) -> Chip | None:
    """What is known of a device; None of CPUs and of what is not in `CHIPS`."""
    return next((found for pattern, found in CHIPS if re.search(pattern, device_kind)), None)


def multiplies_bfloat16(cpu_flags: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether products of bfloat16 are no slower than of float32 here: on accelerators, and on CPUs that have
    instructions for it (AVX-512 BF16 or AMX; BF16 of ARM)."""
    if backend() != "cpu":
        return True
    found = cpu_flags.read_text().split() if cpu_flags.exists() else []
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(found)


_planned: contextvars.ContextVar[str | None] = contextvars.ContextVar("planned", default=None)


def backend() -> str:
    """The platform ("cpu", "gpu", "tpu") that is compiled for: JAX's own, or one that is not here (`compiling_for`)."""
    return _planned.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """What is traced in here is made for a platform, whatever this machine has."""
    token = _planned.set(platform)
    try:
        yield
    finally:
        _planned.reset(token)
