"""Twenty steps on one device, on eight in several meshes, and by two and four processes: the same loss curve?

    python -m benchmarks.meshes          # fake CPU devices, 10 minutes on two cores

A Llama of four layers (8 heads, 4 of keys, 4,096 + 64 rows of vocabulary), random numbers, float32, eight packed rows of 128 tokens, AdamW at 1e-3. Prints the
largest relative difference of a step's loss from that on one device, for full training, LoRA and new rows, and writes benchmarks/results/meshes.json.
"""

import argparse
import dataclasses
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cpt_jax.core.progress import quiet_libraries, say
from cpt_jax.core.storage import write_json_atomic

STEPS, NEW_ROWS = 20, 64
METHODS = ("full", "lora", "new rows")
# (processes, devices of each, mesh)
CASES = [
    (1, 1, "fsdp=1"),
    (1, 8, "fsdp=8"),
    (1, 8, "fsdp=4,tensor=2"),
    (1, 8, "replica=2,fsdp=2,tensor=2"),
    (1, 8, "context=2,fsdp=4"),
    (2, 4, "fsdp=4,tensor=2"),
    (4, 2, "context=2,fsdp=4"),
]


def losses(method_name: str, mesh_text: str) -> list[float]:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from benchmarks.shapes import SHAPES
    from benchmarks.train_step import rows
    from cpt_jax.adapt import Embeddings, Full, LoRA
    from cpt_jax.core.precision import FLOAT32
    from cpt_jax.core.tree import flatten, unflatten
    from cpt_jax.models.decoder import abstract_decoder, initial_weights
    from cpt_jax.models.families import family_for
    from cpt_jax.optim.optimizer import AdamW
    from cpt_jax.sharding.mesh import MeshShape, make_mesh
    from cpt_jax.sharding.placement import spread
    from cpt_jax.sharding.rules import RULES
    from cpt_jax.training.program import Settings
    from cpt_jax.training.step import Controls
    from cpt_jax.training.training import place_weights

    methods = {"full": Full(), "lora": LoRA(rank=8, alpha=16, new_rows=False), "new rows": Embeddings(rows="new")}
    method = methods[method_name]
    sizes: dict[str, Any] = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, vocab_size=4096)
    hf_config = SHAPES["1b"] | sizes | dict(num_attention_heads=8, num_key_value_heads=4, head_dim=32)
    config = dataclasses.replace(family_for(hf_config).config_from_hf(hf_config), new_rows=NEW_ROWS)
    network, mesh = abstract_decoder(config, method.lora_config()), make_mesh(shape=MeshShape.parse(mesh_text))
    weights = flatten(jax.tree.map(np.asarray, initial_weights(network, jax.random.key(0))))
    # B is not zero, so that A has a gradient from the start.
    generator = np.random.default_rng(0)
    for path in sorted(weights):
        if path.endswith("lora_b"):
            weights[path] = 0.02 * generator.standard_normal(weights[path].shape, np.float32)
    program = Settings(
        network=network,
        trains=frozenset(path for path in weights if method.trains(path)),
        names=("text",),
        optimizer=AdamW(learning_rate=1e-3),
        compute="float32",
        mesh=mesh,
    ).program()
    trainable, frozen = place_weights(unflatten(weights), method.trains, FLOAT32, program.where)
    state, found = program.begin(trainable), []
    where = NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["sequence"]))
    batches = rows(argparse.Namespace(batch=8, length=128, documents=4), config.total_rows)
    with jax.set_mesh(mesh):
        for step in range(STEPS):
            batch = {name: spread(array, where) for name, array in batches[step % 4].items()}
            state, metrics = program.step(state, frozen, {}, batch, Controls(np.float32(1e-3)))
            found.append(float(metrics["loss"]))
    return found


def child(arguments: argparse.Namespace) -> None:
    from cpt_jax.core.processes import Processes, is_first

    if arguments.processes > 1:
        Processes(coordinator=arguments.coordinator, count=arguments.processes, index=arguments.process).start()
    found = {method: losses(method, arguments.mesh) for method in METHODS}
    if is_first():
        print(json.dumps(found))


def measured(processes: int, devices: int, mesh: str) -> dict[str, list[float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.meshes", "--mesh", mesh, "--processes", str(processes)]
    command += ["--coordinator", f"127.0.0.1:{port}", "--process"]
    started = [
        subprocess.Popen([*command, str(index)], env=environment, stdout=subprocess.PIPE, text=True)
        for index in range(processes)
    ]
    outputs = [each.communicate()[0] for each in started]
    if any(each.returncode for each in started):
        sys.exit(f"{processes} processes, mesh {mesh}: failed")
    return json.loads(outputs[0].strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.mesh is not None:
        return child(arguments)
    results: list[dict[str, Any]] = []
    print("| processes | devices of each | mesh | " + " | ".join(METHODS) + " |\n|" + "---|" * (3 + len(METHODS)))
    for processes, devices, mesh in CASES:
        curves = measured(processes, devices, mesh)
        alone = results[0]["losses"] if results else curves
        differences = {name: float(np.max(np.abs(np.divide(curve, alone[name]) - 1))) for name, curve in curves.items()}
        case = {"processes": processes, "devices": devices, "mesh": mesh}
        results.append({**case, "losses": curves, "largest_difference": differences})
        shown = " | ".join(f"{difference:.1e}" for difference in differences.values())
        print(f"| {processes} | {devices} | {mesh} | {shown} |", flush=True)
    import jax

    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "jax": jax.__version__}
    out = Path("benchmarks/results/meshes.json")
    write_json_atomic(out, {"machine": machine, "steps": STEPS, "results": results})
    say(str(out))


if __name__ == "__main__":
    main()
