"""Forward and backward of the gated delta rule, beside transformers' own in torch (the one it takes without
flash-linear-attention), in turn; one layer of Qwen3.5's smallest size.

    python -m benchmarks.delta_rule                                            # rows of 512 and 2,048 tokens
    python -m benchmarks.delta_rule --heads 16 32 --lengths 2048 8192 --batch 2       # Qwen3.5-9B's heads, on a GPU

Rows are one document: transformers' keeps no documents apart. Medians of `--repeats`, after one for warming up. Writes
benchmarks/results/delta_rule-<device>.json.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cpt_jax.core.storage import write_json_atomic
from cpt_jax.models.delta_rule import gated_delta_rule
from cpt_jax.models.kernels.visible import Visible


def inputs(batch: int, length: int, heads: tuple[int, int], head_dim: int) -> list[np.ndarray]:
    """q, k, v, log decay, beta of one layer."""
    generator, (keys, values) = np.random.default_rng(0), heads
    q, k = (generator.normal(size=(batch, length, keys, head_dim)) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = generator.normal(size=(batch, length, keys, values // keys, head_dim))
    log_decay = -generator.exponential(0.1, v.shape[:-1])
    return [x.astype(np.float32) for x in (q, k, v, log_decay, generator.uniform(size=v.shape[:-1]))]


def ours(rule: Callable, arrays: list[np.ndarray], compute: str) -> tuple[Callable[[], list], float]:
    """(a call that gives result and gradients where they were computed, temporaries in MiB)."""
    placed = [jnp.asarray(x) for x in arrays]

    def summed(*x):
        mixed, _ = rule(*x, Visible(None), jnp.dtype(compute))
        return jnp.sum(jnp.square(mixed)), mixed

    function = jax.jit(jax.value_and_grad(summed, argnums=range(len(placed)), has_aux=True)).lower(*placed).compile()

    def call() -> list:
        (_, mixed), gradients = jax.block_until_ready(function(*placed))
        return [mixed, *gradients]

    return call, function.memory_analysis().temp_size_in_bytes / 2**20


def theirs(arrays: list[np.ndarray]) -> Callable[[], list]:
    import torch
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, log_decay, beta = (torch.tensor(x, device=device, requires_grad=True) for x in arrays)
    batch, length, keys, shared, width = v.shape
    heads = (batch, length, keys * shared)

    def call() -> list:
        for leaf in (q, k, v, log_decay, beta):
            leaf.grad = None
        mixed, _ = torch_chunk_gated_delta_rule(
            # Queries are scaled within.
            q * q.shape[-1] ** 0.5,
            k,
            v.reshape(*heads, width),
            g=log_decay.reshape(heads),
            beta=beta.reshape(heads),
        )
        mixed.square().sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return [mixed.detach().reshape(v.shape), *(leaf.grad for leaf in (q, k, v, log_decay, beta))]

    return call


def compared(
    rule: Callable, theirs: Callable[[], list], arrays: list[np.ndarray], length: int, repeats: int
) -> list[dict]:
    """A row of figures for each program, which take turns: torch's, and `rule` in both types."""
    programs, temporaries = {"torch float32": theirs}, {}
    for compute in ("float32", "bfloat16"):
        programs[f"cpt_jax {compute}"], temporaries[f"cpt_jax {compute}"] = ours(rule, arrays, compute)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    results = {}
    for _ in range(repeats + 1):
        for name, call in programs.items():
            started = time.perf_counter()
            found = call()
            seconds[name].append(time.perf_counter() - started)
            results[name] = [np.asarray(x.cpu() if hasattr(x, "cpu") else x) for x in found]
    rows = []
    for name, times in seconds.items():
        far = max(
            float(np.linalg.norm(mine - right) / np.linalg.norm(right))
            for mine, right in zip(results[name], results["torch float32"], strict=True)
        )
        row = {"program": name, "length": length, "milliseconds": 1e3 * statistics.median(times[1:])}
        rows.append(row | {"temporaries_mib": temporaries.get(name), "distance_from_torch": far})
        print(f"{length:>6} {name:<18}{row['milliseconds']:>10.1f} ms  {far:.1e}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, nargs=2, default=[16, 16], help="of keys, of values")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    results = []
    for length in arguments.lengths:
        arrays = inputs(arguments.batch, length, tuple(arguments.heads), arguments.head_dim)
        results += compared(gated_delta_rule, theirs(arrays), arrays, length, arguments.repeats)
    written("delta_rule", arguments, results)


def written(name: str, arguments: argparse.Namespace, results: list[dict]) -> None:
    """The figures as a file, with the machine they are of."""
    import torch
    import transformers

    device = jax.devices()[0].device_kind
    machine = {
        "device": device,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    out = Path("benchmarks/results") / f"{name}-{device.replace(' ', '-')}.json"
    write_json_atomic(out, {"machine": machine, "arguments": vars(arguments), "results": results})
    print(out)


if __name__ == "__main__":
    main()
