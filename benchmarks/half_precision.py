"""Gradients of a real model with products of bfloat16 and float16, against float32, by the scale of the loss.

    python -m benchmarks.half_precision [DIRECTORY]

SmolLM2-135M, or another model's directory; all weights train, a row of 256 tokens of English and one of Chinese. What is differentiated is the loss
summed over the tokens, times the scale. The program is a GPU's, which writes products in the type of their inputs, on whatever is here. The error is the norm of the gradient's difference from that of float32, over its norm, of all weights and of the
tensor where it is largest. Prints a Markdown table and writes benchmarks/results/half_precision-NAME.json.
"""

import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from benchmarks.shapes import model_directory
from configs.quickstart_inputs import fetch
from cpt_jax.core.precision import FLOAT32
from cpt_jax.core.progress import say
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.core.tree import Tree, flatten, unflatten
from cpt_jax.recipe.model import load_model
from cpt_jax.sharding.hardware import compiling_for
from cpt_jax.training.loss import make_loss
from cpt_jax.vocab.tokenizer import Tokenizer

OUT = "benchmarks/results/half_precision-{}.json"
LENGTH = 256
# (type of the products' inputs, scale of the loss).
CASES = [("bfloat16", 1.0), *(("float16", 2.0**power) for power in (-20, -10, -6, 0, 6, 10, 16))]


def row(ids: list[int]) -> dict[str, np.ndarray]:
    """A batch of one row."""
    inputs, targets = (np.asarray(ids[first : first + LENGTH], np.int32)[None] for first in (0, 1))
    ones = np.ones_like(inputs)
    return {
        "inputs": inputs,
        "targets": targets,
        "positions": np.arange(LENGTH, dtype=np.int32)[None],
        "segment_ids": ones,
        "domains": 0 * ones,
        "weights": ones.astype(np.float32),
    }


def gradients(network, compute: str) -> Callable[[Tree, dict, float], tuple[float, dict[str, np.ndarray]]]:
    """A function (weights, batch, scale) -> (loss a token, gradient of the loss's sum), both without the scale."""
    loss = make_loss(network, compute, lambda path: True, ["text"])

    def scaled(leaves, batch, scale):
        return loss(unflatten(leaves), batch)[0] * scale

    compiled = jax.jit(jax.value_and_grad(scaled))

    def found(weights, batch, scale):
        with compiling_for("gpu"):
            total, leaves = compiled(flatten(weights), batch, np.float32(scale))
        return float(total) / scale / LENGTH, {
            path: np.asarray(leaf, np.float64) / scale for path, leaf in leaves.items()
        }

    return found


def norm(leaves) -> float:
    return float(np.sqrt(sum(np.sum(leaf**2) for leaf in leaves)))


def main() -> None:
    fetch()
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else model_directory("smollm2")
    model, tokenizer = load_model(directory).looped(), Tokenizer(directory)
    model = model.attending("xla", LENGTH, np.dtype(np.float32))
    weights = model.on_device(FLOAT32)
    of = {compute: gradients(model.network, compute) for compute in ("float32", "bfloat16", "float16")}
    lines = []
    for text in ("wikipedia", "statutes"):
        with open(f".cache/quickstart/{text}.jsonl", encoding="utf-8") as file:
            (ids,) = tokenizer.encode_documents(["\n".join(json.loads(next(file))["text"] for _ in range(20))])
        ids = [tokenizer.start_id, *ids]
        loss, exact = of["float32"](weights, row(ids), 1.0)
        say(f"{text}: {loss:.4f} nats a token in float32")
        for compute, scale in CASES:
            found_loss, found = of[compute](weights, row(ids), scale)
            apart = {path: norm([found[path] - exact[path]]) / norm([exact[path]]) for path in exact}
            line = {
                "text": text,
                "compute": compute,
                "scale": scale,
                "loss": found_loss,
                "loss_error": abs(found_loss / loss - 1),
                "gradient_error": norm(found[path] - exact[path] for path in exact) / norm(exact.values()),
                "largest_of_a_tensor": max(apart.values()),
            }
            lines.append(line)
            say(f"{text}, {compute}, scale 2^{np.log2(scale):.0f}: {line['gradient_error']:.2e}")
    versions = {"jax": jax.__version__, "python": platform.python_version(), "machine": platform.machine()}
    device = jax.devices()[0].device_kind
    write_json_atomic(
        Path(OUT.format(directory.name)), {"device": device, "versions": versions, "length": LENGTH, "results": lines}
    )
    print(
        "| text | products | scale of the loss | error of the loss | of the gradient | of the worst tensor's |\n|---|---|---|---|---|---|"
    )
    for line in lines:
        errors = " | ".join(f"{line[name]:.1e}" for name in ("loss_error", "gradient_error", "largest_of_a_tensor"))
        print(f"| {line['text']} | {line['compute']} | 2^{np.log2(line['scale']):.0f} | {errors} |")


if __name__ == "__main__":
    main()
