"""Forward and backward of attention: every kernel that this machine has, against the reference.

    python -m benchmarks.attention                                   # SmolLM2's heads, rows of 256, 512, 1024 and 4096
    python -m benchmarks.attention --heads 32 8 --head-dim 128 --lengths 2048 4096 8192 --batch 4      # Llama 3's

Each at rows of one document and at packed ones (documents of an eighth of the row, not at the blocks' edges).
Medians of `--repeats`, after one for warming up; "temporaries" is what the compiled program allocates besides its
arguments and results. Writes benchmarks/results/attention-<device>.json; the kernels that the machine refuses are named
there with the reason.
"""

import argparse
import dataclasses
import functools
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from cpt_jax.core.storage import write_json_atomic
from cpt_jax.models.kernels.attend import attend
from cpt_jax.models.kernels.choice import Kernel, Work, choose, refusal
from cpt_jax.models.kernels.visible import Visible
from cpt_jax.sharding.hardware import compute_capability

KERNELS: tuple[Kernel, ...] = ("xla", "blocks", "cudnn", "tokamax", "splash")
# No row of these has more.
DOCUMENTS = 16


def begins_of(batch: int, length: int) -> np.ndarray:
    """Where documents of an eighth of the row begin: the first row's first one is cut to a third, the next ones' at
    two thirds, and so on."""
    each = max(length // 8, 1)
    shift = ((np.arange(batch) + 1) * (each // 3) % each)[:, None]
    return np.maximum((np.arange(length)[None] - shift) // each * each + shift, 0).astype(np.int32)


def measure(kernel: Kernel, arrays, visible: Visible, work: Work, repeats: int) -> tuple[dict, list]:
    """(figures, result and gradients)."""
    options = dict(windows=work.windows, softcap=work.softcap, dtype=work.dtype, kernel=kernel)
    call = functools.partial(attend, **options, documents=DOCUMENTS)

    def summed(q, k, v, w, begins):
        mixed = call(q, k, v, Visible(begins))
        return (mixed * w).sum(), mixed

    function = jax.jit(jax.value_and_grad(summed, argnums=(0, 1, 2), has_aux=True))
    started = time.perf_counter()
    compiled = function.lower(*arrays, visible.begins).compile()
    compile_seconds = time.perf_counter() - started
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        result = jax.block_until_ready(compiled(*arrays, visible.begins))
        seconds.append(time.perf_counter() - started)
    figures = {
        "milliseconds": 1e3 * statistics.median(seconds[1:]),
        "fastest_milliseconds": 1e3 * min(seconds[1:]),
        "temporaries_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "compile_seconds": compile_seconds,
    }
    (_, mixed), gradients = result
    return figures, [mixed, *gradients]


def distance(found: list, exact: list) -> float:
    """The largest relative distance of result and gradients (root of the mean square)."""
    return max(
        float(jnp.linalg.norm(mine - theirs) / jnp.linalg.norm(theirs))
        for mine, theirs in zip(found, exact, strict=True)
    )


def compared(length: int, packed: bool, arguments: argparse.Namespace) -> list[dict]:
    """A row of figures for each kernel."""
    heads, groups = arguments.heads
    sizes = [(arguments.batch, number, length, arguments.head_dim) for number in (heads, groups, groups, heads)]
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True)]
    arrays[0] = arrays[0] * arguments.head_dim**-0.5
    visible = Visible(jnp.asarray(begins_of(arguments.batch, length)) if packed else None)
    rows = []
    for compute in arguments.compute:
        work = Work(
            backend=jax.default_backend(),
            capability=compute_capability(),
            length=length,
            head_dim=arguments.head_dim,
            windows=(arguments.window,),
            softcap=arguments.softcap,
            dtype=jnp.dtype(compute),
        )
        exact = measure("xla", arrays, visible, dataclasses.replace(work, dtype=jnp.dtype("float32")), 1)[1]
        for kernel in KERNELS:
            row = {"kernel": kernel, "length": length, "packed": packed, "compute": compute}
            if (why := refusal(kernel, work)) is not None:
                rows.append(row | {"refused": why})
                continue
            figures, found = measure(kernel, arrays, visible, work, arguments.repeats)
            figures |= {"distance_from_float32": distance(found, exact), "taken_unasked": choose(work) == kernel}
            rows.append(row | figures)
            print(
                f"{length:>6} {'packed' if packed else 'whole':<7}{compute:<9} {kernel:<7}"
                f"{figures['milliseconds']:>10.2f} ms{figures['temporaries_mib']:>9.1f} MiB"
                f"{figures['distance_from_float32']:>10.1e}{' *' if figures['taken_unasked'] else ''}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 4096])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, nargs=2, default=[9, 3], help="of queries, of keys")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--window", type=int)
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--compute", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/attention-<device>.json")
    parser.add_argument("--note", default="", help="what else the machine did meanwhile")
    arguments = parser.parse_args()
    results = [
        row for length in arguments.lengths for packed in (False, True) for row in compared(length, packed, arguments)
    ]
    device = jax.devices()[0].device_kind
    machine = {
        "device": device,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "note": arguments.note,
    }
    out = arguments.out or Path("benchmarks/results") / f"attention-{device.replace(' ', '-')}.json"
    out.parent.mkdir(exist_ok=True)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "note")}
    write_json_atomic(out, {"machine": machine, "arguments": settings, "results": results})
    print(out)


if __name__ == "__main__":
    main()
