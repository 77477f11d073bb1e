"""Plans beside what steps really took: on this machine's CPU, and an H200's figures that are kept in benchmarks/results.

    python -m benchmarks.plan_checks

A CPU's step is run twice in a process of its own; its memory is the process's peak less what was there before the weights. The H200's plan needs JAX's CUDA plugin (no GPU). Prints Markdown and writes
benchmarks/results/plan_checks.json.
"""

import argparse
import gc
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.shapes import SHAPES, peak_resident
from cpt_jax.core.progress import quiet_libraries, say
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.plan.command import Wanted, stage_of_model
from cpt_jax.plan.hardware import hardware_named, prepare
from cpt_jax.plan.plan import plan_stage
from cpt_jax.plan.stage import PlannedStage, arguments_of
from cpt_jax.sharding.mesh import MeshShape, make_mesh

RESULTS = Path("benchmarks/results")
SMOLLM2 = SHAPES["30m"] | {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rope_theta": 100_000.0,
}
MODELS = {"smollm2": SMOLLM2, "30m": SHAPES["30m"]}
METHODS = ("full", "lora", "new-rows")
ROWS, SEQUENCE = 2, 256


def stage_of(hf_config: dict, method: str, hardware: str, sequence: int) -> PlannedStage:
    new = 2048 if method == "new-rows" else None
    wanted = Wanted(method=method, sequence=sequence, batch=ROWS, new_tokens=new)
    return stage_of_model(hf_config, wanted, hardware_named(hardware), MeshShape())


def resident() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def measured(model: str, method: str) -> dict:
    """Of this process: bytes that two steps took at most beyond what was there before, and seconds of the second."""
    planned, mesh = stage_of(MODELS[model], method, "cpu-1", SEQUENCE), make_mesh(jax.devices()[:1])
    program, arguments = arguments_of(planned, planned.network("cpu"), mesh)
    with jax.set_mesh(mesh):
        compiled = program.step.lower(*arguments).compile()
        gc.collect()
        # The peak so far is the compiler's: begin anew (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")
        before = resident()
        given = jax.tree.map(lambda leaf: jax.device_put(np.ones(leaf.shape, leaf.dtype), leaf.sharding), arguments[:4])
        state, *rest = given
        del given
        for _ in range(2):
            started = time.perf_counter()
            state, _ = jax.block_until_ready(compiled(state, *rest, arguments[4]))
    return {"bytes": peak_resident() - before, "seconds": time.perf_counter() - started}


def on_cpu() -> list[dict]:
    found = []
    for model in MODELS:
        for method in METHODS:
            command = [sys.executable, "-m", "benchmarks.plan_checks", "--measure", model, method]
            took = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            plan = plan_stage(stage_of(MODELS[model], method, "cpu-1", SEQUENCE), hardware_named("cpu-1"))
            found.append({"device": "cpu", "model": model, "method": method, "plan": plan.figures(), "measured": took})
            say(f"{model} {method}: planned {plan.memory.total / 1e6:,.0f} MB, took {took['bytes'] / 1e6:,.0f}")
    return found


def on_h200() -> list[dict]:
    """Llama 3.2 1B's shape in two rows of 8,192 tokens, as `benchmarks.train_step` ran it."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        say("no CUDA plugin: the H200's plan is left out")
        return []
    kept = json.loads((RESULTS / "train_step-NVIDIA-H200.json").read_text())["results"]
    found = []
    for row in kept:
        if (row["model"], row["sequence"], row["program"]) != ("1b", 8192, "cpt_jax") or row["method"] not in METHODS:
            continue
        planned = stage_of(SHAPES["1b"], row["method"], "h200-1", 8192)
        figures = plan_stage(planned, hardware_named("h200-1")).figures()
        took = {"bytes": row["peak_bytes"], "seconds": row["seconds"]}
        found.append({"device": "H200", "model": "1b", "method": row["method"], "plan": figures, "measured": took})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "METHOD"), help="one step, in this process")
    arguments = parser.parse_args()
    quiet_libraries()
    prepare(hardware_named("cpu-1"))
    if arguments.measure:
        print(json.dumps(measured(*arguments.measure)))
        return
    results = on_cpu() + on_h200()
    print("| device | model | method | GB, planned | GB, measured | | s a step, planned | measured |")
    print("|---|---|---|---|---|---|---|---|")
    for row in results:
        planned, took = row["plan"]["bytes_per_chip"]["total"], row["measured"]["bytes"]
        seconds = row["plan"].get("estimated_step_seconds")
        shown = "" if seconds is None else f"{seconds:.3f}"
        print(
            f"| {row['device']} | {row['model']} | {row['method']} | {planned / 1e9:.2f} | {took / 1e9:.2f} | {planned / took:.2f} | {shown} | {row['measured']['seconds']:.3f} |"
        )
    write_json_atomic(RESULTS / "plan_checks.json", {"jax": jax.__version__, "results": results})


if __name__ == "__main__":
    main()
