"""LoRA and new rows alone against full training: time and memory of a step, beside what they are on paper.

    python -m benchmarks.methods [--sequence 256] [--tokens 512] [--compute bfloat16] [--loop unroll scan]

SmolLM2-135M with 2,000 new rows, AdamW. Seconds are the median of six steps after two. The program's figures are XLA's (`memory_analysis`): arguments (weights and
optimizer state) and temporaries. Paper: cpt_jax/training/memory.py and cpt_jax/training/flops.py. Prints a Markdown table and writes benchmarks/results/methods-DEVICE.json.
"""

import argparse
import dataclasses
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from benchmarks.shapes import model_directory
from benchmarks.train_step import rows
from cpt_jax.adapt import Embeddings, Full, LoRA, Method
from cpt_jax.core.precision import Precision
from cpt_jax.core.progress import quiet_libraries, say
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.core.tree import flatten, unflatten
from cpt_jax.data.packing import documents_in_a_row
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.recipe.model import Model, load_model
from cpt_jax.sharding.mesh import make_mesh
from cpt_jax.training.flops import token_flops
from cpt_jax.training.memory import stage_memory
from cpt_jax.training.program import Settings
from cpt_jax.training.step import Controls
from cpt_jax.training.training import place_weights

NEW_ROWS, STEPS, WARM_UP = 2000, 6, 2
METHODS: dict[str, Method] = {
    "full": Full(),
    "lora": LoRA(rank=16, alpha=32, new_rows=False),
    "new rows": Embeddings(rows="new"),
}


def grown() -> Model:
    """SmolLM2 with new rows of zeros."""
    model = load_model(model_directory("smollm2"))
    new = np.zeros((NEW_ROWS, model.config.hidden_size), np.float32)
    weights = unflatten(flatten(model.weights) | {"embed/new": new})
    return dataclasses.replace(model, config=dataclasses.replace(model.config, new_rows=NEW_ROWS), weights=weights)


def measure(method: Method, arguments: argparse.Namespace, loop: Literal["unroll", "scan"]) -> dict:
    precision, optimizer = Precision(compute=arguments.compute), AdamW(learning_rate=1e-5)
    model = grown().adapted(method, 0).for_training(jax.default_backend(), layer_loop=loop)
    documents = documents_in_a_row(arguments.length, arguments.documents / arguments.length)
    model = model.attending("auto", arguments.length, precision.dtype, documents)
    config, mesh = model.config, make_mesh(jax.devices()[:1])
    program = Settings(
        network=model.network,
        trains=frozenset(path for path in flatten(model.weights) if method.trains(path)),
        names=("text",),
        optimizer=optimizer,
        compute=arguments.compute,
        mesh=mesh,
    ).program()
    trainable, frozen = place_weights(model.weights, method.trains, precision, program.where)
    state = program.begin(trainable)
    del trainable
    batches, controls = rows(arguments, config.vocab_size), Controls(np.float32(1e-5))
    seconds = []
    with jax.set_mesh(mesh):
        compiled = program.step.lower(state, frozen, {}, batches[0], controls).compile()  # type: ignore[attr-defined]
        for number in range(WARM_UP + STEPS):
            started = time.perf_counter()
            state, _ = jax.block_until_ready(compiled(state, frozen, {}, batches[number % 4], controls))
            seconds.append(time.perf_counter() - started)
    paper = stage_memory(
        model.network,
        method.trains,
        optimizer,
        precision=precision,
        rows=arguments.batch,
        sequence_length=arguments.length,
        scores=config.attention == "xla",
    )
    memory = compiled.memory_analysis()
    return {
        "loop": loop,
        "seconds": statistics.median(seconds[WARM_UP:]),
        "flops": token_flops(model.network, method.trains, arguments.length).total,
        "held_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "paper": {**paper._asdict(), "held": paper.held, "temporary": paper.temporary},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence", dest="length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--loop", choices=("unroll", "scan"), nargs="+", default=["unroll", "scan"])
    arguments = parser.parse_args()
    arguments.batch = arguments.tokens // arguments.length
    quiet_libraries()
    header = (
        "layers",
        "method",
        "s a step",
        "of full",
        "FLOPs of full",
        "held MB",
        "on paper",
        "temporaries MB",
        "on paper",
    )
    lines, results = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)], []
    for loop in arguments.loop:
        full = None
        for name, method in METHODS.items():
            found = measure(method, arguments, loop)
            full = full or found
            results.append({"method": name, **found})
            shown = [loop, name, f"{found['seconds']:.3g}", f"{found['seconds'] / full['seconds']:.2f}"]
            shown += [f"{found['flops'] / full['flops']:.2f}"]
            shown += [f"{value / 1e6:,.0f}" for value in (found["held_bytes"], found["paper"]["held"])]
            shown += [f"{value / 1e6:,.0f}" for value in (found["temporary_bytes"], found["paper"]["temporary"])]
            lines.append("| " + " | ".join(shown) + " |")
            say(lines[-1])
    print("\n".join(lines))
    device = jax.devices()[0].device_kind
    machine = {"device": device, "cores": os.cpu_count(), "python": platform.python_version(), "jax": jax.__version__}
    out = Path("benchmarks/results") / f"methods-{device.replace(' ', '-')}.json"
    write_json_atomic(out, {"machine": machine, "arguments": vars(arguments), "results": results})
    say(str(out))


if __name__ == "__main__":
    main()
