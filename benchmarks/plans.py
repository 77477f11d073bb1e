"""The plans of docs/plans.md: Llama 3.1 8B and 70B shapes on TPU slices, scaling from 8 to 4,096 chips, and plans beside what was measured.

    python -m benchmarks.plans [table] [scaling] [checks] [show]

Needs libtpu for the first two (pip install libtpu), and JAX's CUDA plugin for the GPU's line of the checks; no device. A plan takes one to three minutes on two cores. What is in benchmarks/results/plans.json
is not compiled again (remove it, or an entry of it). `show` prints the tables and draws docs/plans_scaling.png.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from benchmarks.shapes import SHAPES
from cpt_jax.core.progress import quiet_libraries, say
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.models.remat import Remat
from cpt_jax.plan.command import Wanted, stage_of_model
from cpt_jax.plan.hardware import hardware_named, prepare
from cpt_jax.plan.paper import on_paper
from cpt_jax.plan.plan import plan_stage
from cpt_jax.plan.search import candidates, named
from cpt_jax.plan.stage import PlannedStage
from cpt_jax.sharding.mesh import MeshShape

RESULTS, PICTURE = Path("benchmarks/results"), Path("docs/plans_scaling.png")
_UNTIED = SHAPES["1b"] | {"tie_word_embeddings": False, "num_key_value_heads": 8, "head_dim": 128}
# Llama 3.1's configurations.
MODELS = {
    "8B": _UNTIED
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": _UNTIED
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
METHODS = {"full": 0, "lora": 0, "new-rows": 8192}
HARDWARE = ("v5e-256", "v5p-128", "v5p-512", "v6e-256")
SEQUENCE, ROWS, TRIES = 8192, 256, 2
# The scaling: one recipe, 512 rows a step. One row a chip, as many parts as it takes; beyond 512 chips, tensor.
SCALED_ROWS, COMPILED = 512, (8, 64, 512, 4096)
SIDES = {8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16"}  # fmt: skip


def stage_of(model: str, method: str, hardware) -> PlannedStage:
    wanted = Wanted(method=method, sequence=SEQUENCE, new_tokens=METHODS[method])
    return stage_of_model(MODELS[model], wanted, hardware, MeshShape())


def table(found: dict) -> None:
    """The quickest way on paper that compiles and fits, of two; or the last that was tried."""
    for model in MODELS:
        for hardware in map(hardware_named, HARDWARE):
            for method in METHODS:
                key = f"{model} {method} {hardware.name}"
                if key in found:
                    continue
                ranked = candidates(stage_of(model, method, hardware), hardware, batch_size=ROWS)
                figures, refused = {}, []
                for each in ranked[:TRIES]:
                    say(f"{key}: {named(each.planned, each.shape)}")
                    figures = plan_stage(each.planned, hardware, each.shape).figures()
                    if figures["fits"]:
                        break
                    refused.append(named(each.planned, each.shape))
                yield_result(found, key, figures | {"did_not_fit": refused})


def scaled(chips: int):
    """(the stage, its hardware, its mesh) of the scaling."""
    hardware = hardware_named(f"v5p:{SIDES[chips]}")
    tensor = max(1, chips // SCALED_ROWS)
    parts = max(1, SCALED_ROWS // chips)
    planned = stage_of("8B", "full", hardware)
    stage = dataclasses.replace(planned.stage, batch_size=SCALED_ROWS, accumulate=parts, remat=Remat())
    shape = MeshShape(tensor=tensor).over(chips)
    return dataclasses.replace(planned, stage=stage), hardware, shape


def scaling(found: dict) -> None:
    for chips in SIDES:
        planned, hardware, shape = scaled(chips)
        key = f"scaling {chips}"
        if chips in COMPILED and "mesh" not in found.get(key, {}):
            say(f"{key}: {shape}")
            yield_result(found, key, plan_stage(planned, hardware, shape).figures())
        elif key not in found:
            paper = on_paper(planned, shape, "tpu")
            yield_result(found, key, {"chips": chips, "on_paper": dataclasses.asdict(paper) | {"total": paper.total}})


def yield_result(found: dict, key: str, figures: dict) -> None:
    path = RESULTS / "plans.json"
    # Another process may have added to it meanwhile.
    found |= (json.loads(path.read_text()) if path.exists() else {}) | {key: figures}
    write_json_atomic(path, found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["table", "scaling", "checks", "show"])
    arguments = parser.parse_args()
    quiet_libraries()
    prepare(hardware_named("cpu-1"))
    results = json.loads((RESULTS / "plans.json").read_text()) if (RESULTS / "plans.json").exists() else {}
    for part in arguments.parts:
        {"table": table, "scaling": scaling}[part](results)
