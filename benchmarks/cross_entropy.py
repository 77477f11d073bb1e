"""The chunked cross-entropy beside the plain one, at vocabularies of 32k, 128k and 256k: time, memory, and both against float64.

    python -m benchmarks.cross_entropy [--tokens 1024] [--width 576]

Loss and gradients of the hidden states and of the table, once. Plain: the logits whole, `optax.softmax_cross_entropy_with_integer_labels`, JAX's own
gradient. Seconds are the median of five; memory is the compiled program's temporaries and outputs. Errors are of float32 products, relative: of the loss, and of each
gradient as the norm of the difference over the norm. Prints a Markdown table and writes benchmarks/results/cross_entropy-DEVICE.json.
"""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cpt_jax.core.progress import say
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.models.cross_entropy import TableUse, token_losses
from cpt_jax.models.products import contract

VOCABULARIES = (32_768, 131_072, 262_144)


def chunked(hidden, table, targets, weights, dtype):
    return token_losses(hidden, (table,), targets, weights, dtype, (TableUse(len(table), True),)).total


def plain(hidden, table, targets, weights, dtype):
    logits = contract("nd,vd->nv", hidden, table, jnp.dtype(dtype))
    return (optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights).sum()


def exact(hidden, table, targets, weights) -> tuple[float, np.ndarray, np.ndarray]:
    """In float64, a few tokens at a time, the gradients by their formulas."""

    @jax.jit
    def part(rows, table, targets, weights):
        logits = rows @ table.T
        logits -= logits.max(1, keepdims=True)
        probabilities = jnp.exp(logits)
        sums = probabilities.sum(1)
        each = jnp.arange(len(rows)), targets
        loss = ((jnp.log(sums) - logits[each]) * weights).sum()
        change = (probabilities / sums[:, None]).at[each].add(-1.0) * weights[:, None]
        return loss, change @ table, change.T @ rows

    total, dhidden = 0.0, []
    with jax.enable_x64(True):
        wide = jnp.asarray(table, jnp.float64)
        dtable = jnp.zeros_like(wide)
        for first in range(0, len(hidden), 256):
            rows = slice(first, first + 256)
            found = part(
                jnp.asarray(hidden[rows], jnp.float64), wide, targets[rows], jnp.asarray(weights[rows], jnp.float64)
            )
            total += float(found[0])
            dhidden.append(np.asarray(found[1]))
            dtable += found[2]
        return total, np.concatenate(dhidden), np.asarray(dtable)


def measure(function, inputs, dtype: str, expected) -> dict:
    step = jax.jit(jax.value_and_grad(lambda *arrays: function(*arrays, dtype), argnums=(0, 1)))
    compiled = step.lower(*inputs).compile()
    memory = compiled.memory_analysis()
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        loss, gradients = jax.block_until_ready(compiled(*inputs))
        seconds.append(time.perf_counter() - started)
    found = {
        "seconds": statistics.median(seconds[1:]),
        "bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
    }
    if dtype == "float32":
        errors = [
            float(np.linalg.norm(np.asarray(mine, np.float64) - right) / np.linalg.norm(right))
            for mine, right in zip(gradients, expected[1:], strict=True)
        ]
        found |= {"loss_error": abs(float(loss) - expected[0]) / expected[0], "gradient_errors": errors}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=576)
    arguments = parser.parse_args()
    results, lines = (
        [],
        ["| vocabulary | precision | loss | seconds | MB | error of loss | of gradients |", "|" + "---|" * 7],
    )
    for vocabulary in VOCABULARIES:
        generator = np.random.default_rng(0)
        hidden = generator.standard_normal((arguments.tokens, arguments.width), np.float32)
        table = 0.05 * generator.standard_normal((vocabulary, arguments.width), np.float32)
        targets = generator.integers(0, vocabulary, arguments.tokens).astype(np.int32)
        weights = (generator.random(arguments.tokens) < 0.8).astype(np.float32)
        expected = exact(hidden, table, targets, weights)
        inputs = [jnp.asarray(each) for each in (hidden, table, targets, weights)]
        for dtype in ("float32", "bfloat16"):
            for function in (plain, chunked):
                found = measure(function, inputs, dtype, expected)
                name = function.__name__
                results.append({"vocabulary": vocabulary, "compute": dtype, "loss": name, **found})
                shown = [f"{vocabulary:,}", dtype, name, f"{found['seconds']:.3g}", f"{found['bytes'] / 1e6:,.0f}"]
                shown += (
                    [f"{found['loss_error']:.0e}", ", ".join(f"{e:.0e}" for e in found["gradient_errors"])]
                    if dtype == "float32"
                    else ["", ""]
                )
                lines.append("| " + " | ".join(shown) + " |")
                say(lines[-1])
    print("\n".join(lines))
    device = jax.devices()[0].device_kind
    machine = {"device": device, "cores": os.cpu_count(), "python": platform.python_version(), "jax": jax.__version__}
    out = Path("benchmarks/results") / f"cross_entropy-{device.replace(' ', '-')}.json"
    write_json_atomic(out, {"machine": machine, "arguments": vars(arguments), "results": results})
    say(str(out))


if __name__ == "__main__":
    main()
