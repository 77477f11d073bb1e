"""What accelerators can do at most, by the names that JAX gives them, and which of them is compiled for."""

import contextlib
import contextvars
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import jax

# Dense products, FLOP/s a device, from the makers' data sheets: of types of 16 bits, and of float32 (a TPU makes six products
# of bfloat16 of one). The first pattern that is found in `device_kind` counts.
PEAK_FLOPS: tuple[tuple[str, float, float], ...] = (
    (r"B200", 2250e12, 75e12),
    (r"H200|H100 80GB HBM3|GH200", 989.4e12, 67e12),
    (r"H100 NVL", 835e12, 60e12),
    (r"H100", 756e12, 51e12),
    (r"A100", 312e12, 19.5e12),
    (r"A10G", 70e12, 35e12),
    (r"L40S", 362e12, 91.6e12),
    (r"L4\b", 121e12, 30.3e12),
    (r"RTX 4090", 165.2e12, 82.6e12),
    (r"V100", 125e12, 15.7e12),
    (r"T4\b", 65e12, 8.1e12),
    (r"TPU ?7x|TPU v7", 2307e12, 2307e12 / 6),
    (r"TPU v6", 918e12, 918e12 / 6),
    (r"TPU v5 lite|TPU v5e", 197e12, 197e12 / 6),
    (r"TPU v5", 459e12, 459e12 / 6),
    (r"TPU v4", 275e12, 275e12 / 6),
)
# Compute bfloat16 as float32.
_BEFORE_BFLOAT16 = r"V100|T4\b"


def peak_flops(device_kind: str, compute: str = "bfloat16") -> float | None:
    """A device's peak of products of a type, FLOP/s; None where it is not known (CPUs)."""
    found = next((peaks for pattern, *peaks in PEAK_FLOPS if re.search(pattern, device_kind)), None)
    if found is None or compute not in ("float32", "bfloat16", "float16"):
        return None
    wide = compute == "float32" or (compute == "bfloat16" and re.search(_BEFORE_BFLOAT16, device_kind))
    return found[1] if wide else found[0]


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
# of 4 chips. GPUs: NVIDIA's data sheets (T4, L4: PCIe; of a T4's 16 GB its error correction takes some); network: one 400 Gbit/s
# (A100: 200) adapter a GPU, as in DGX; T4 and L4: 100 Gbit/s a machine of 8 or fewer.
CHIPS: tuple[tuple[str, Chip], ...] = (
    (r"H200", Chip(141e9, 4.8e12, 450e9, 50e9)),
    (r"H100", Chip(80e9, 3.35e12, 450e9, 50e9)),
    (r"A100", Chip(80e9, 2.039e12, 300e9, 25e9)),
    (r"L4\b", Chip(24e9, 300e9, 32e9, 1.5625e9)),
    (r"T4\b", Chip(15 * 2**30, 320e9, 16e9, 1.5625e9)),
    (r"TPU v6", Chip(32 * 2**30, 1.64e12, 100e9, 12.5e9)),
    (r"TPU v5 lite|TPU v5e", Chip(16 * 2**30, 819e9, 50e9, 3.125e9)),
    (r"TPU v5", Chip(95e9, 2.765e12, 100e9, 6.25e9)),
    (r"TPU v4", Chip(32 * 2**30, 1.2e12, 50e9, 6.25e9)),
)


def chip(device_kind: str) -> Chip | None:
    """What is known of a device; None of CPUs and of what is not in `CHIPS`."""
    return next((found for pattern, found in CHIPS if re.search(pattern, device_kind)), None)


def fastest_type(cpu_flags: Path = Path("/proc/cpuinfo")) -> Literal["bfloat16", "float16", "float32"]:
    """The type of a model's products that is fastest here: bfloat16 on accelerators and on CPUs that have instructions
    for it (AVX-512 BF16 or AMX; BF16 of ARM), float32 on other CPUs. On NVIDIA GPUs before Ampere (T4, V100) float16: for
    these XLA makes float32 of bfloat16 before it multiplies."""
    if backend() == "cpu":
        found = cpu_flags.read_text().split() if cpu_flags.exists() else []
        return "float32" if {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(found) else "bfloat16"
    capability = compute_capability()
    return "bfloat16" if capability is None or capability >= 8 else "float16"


def compute_capability() -> float | None:
    """Of the NVIDIA GPU that is compiled for (T4 7.5, A100 8, H100 9); of one that is not here, 9. None of other devices."""
    if backend() != "gpu":
        return None
    here = getattr(jax.local_devices()[0], "compute_capability", "9.0")
    # AMD's are names, as gfx942.
    return float(here) if re.fullmatch(r"\d+\.\d+", here) else None


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
