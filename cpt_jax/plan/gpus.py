"""GPUs that are not here, as XLA's CUDA compiler takes them."""

import functools
import importlib.util
from typing import Any

import jax
from jax.experimental import topologies

from cpt_jax.core.errors import UserError

# Of each kind, from NVIDIA's data sheets and its CUDA programming guide (compute capabilities): (compute capability,
# multiprocessors, of each float32 units and threads; bytes: shared memory of a multiprocessor, of it for a block, level-2
# cache, memory; memory's bytes/s, clock in GHz).
_DEVICES = {
    "t4": ((7, 5), 40, 64, 1024, 65536, 65536, 4 << 20, 15 << 30, 320e9, 1.59),
    "l4": ((8, 9), 58, 128, 1536, 102400, 101376, 48 << 20, 24 * 10**9, 300e9, 2.04),
    "a100": ((8, 0), 108, 64, 2048, 167936, 166912, 40 << 20, 80 << 30, 2039e9, 1.41),
    "h100": ((9, 0), 132, 128, 2048, 233472, 232448, 50 << 20, 80 << 30, 3352e9, 1.98),
    "h200": ((9, 0), 132, 128, 2048, 233472, 232448, 50 << 20, 141 * 10**9, 4800e9, 1.98),
}


@functools.lru_cache(maxsize=8)
def gpus(kind: str, count: int) -> tuple[Any, ...]:
    """So many GPUs of a kind, in machines of 8, to compile for.

    Raises:
      UserError: JAX's CUDA plugin, which has the compiler, is not installed.
    """
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise UserError(
            f"{kind} is compiled for by XLA's CUDA compiler, which is not installed: pip install --no-deps jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__} (no GPU and no driver needed)"
        )
    shape = f"1x{max(1, count // 8)}x{min(8, count)}"
    topology = topologies.get_topology_desc(
        topology_name=shape, platform="cuda", topology=shape, target_config=_target(kind)
    )
    return tuple(topology.devices)


def _target(kind: str) -> str:
    """A GpuTargetConfigProto of XLA, as text."""
    (major, minor), cores, units, threads, shared, of_block, cache, memory, bandwidth, clock = _DEVICES[kind]
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": threads,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": of_block,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "core_count": cores,
        "fpus_per_core": units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "l2_cache_size": cache,
        "clock_rate_ghz": clock,
        "device_memory_size": memory,
        "memory_bandwidth": int(bandwidth),
    }
    fields = " ".join(f"{name}: {value}" for name, value in info.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{kind}"'
    )
