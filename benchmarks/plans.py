"""The plans of docs/plans.md: Llama 3.1 8B and 70B shapes on TPU slices, and scaling from 8 to 4,096 chips.

    python -m benchmarks.plans [table] [scaling] [show]

Needs libtpu (pip install libtpu) and no device. A plan takes one to three minutes on two cores. What is in benchmarks/results/plans.json
is not compiled again (remove it, or an entry of it). `show` writes the tables into docs/plans.md and draws docs/plans_scaling.png.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.shapes import SHAPES
from cpt_jax.core.progress import quiet_libraries, say
from cpt_jax.core.storage import write_json_atomic, write_text_atomic
from cpt_jax.models.remat import Remat
from cpt_jax.plan.command import Wanted, stage_of_model
from cpt_jax.plan.hardware import hardware_named, prepare
from cpt_jax.plan.paper import on_paper
from cpt_jax.plan.plan import plan_stage
from cpt_jax.plan.search import candidate_of, candidates, named, remat_name
from cpt_jax.plan.stage import PlannedStage
from cpt_jax.sharding.mesh import MeshShape

RESULTS, PAGE, PICTURE = Path("benchmarks/results"), Path("docs/plans.md"), Path("docs/plans_scaling.png")
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


def table(found: dict, methods: Sequence[str]) -> None:
    """The quickest way on paper that compiles and fits, of two; or the last that was tried."""
    for method in methods:
        for model in MODELS:
            for hardware in map(hardware_named, HARDWARE):
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


def show(found: dict) -> None:
    """Writes the tables into docs/plans.md and draws the picture."""
    header = "| model | method | hardware | mesh | rows x parts | remat | GB a chip | weights | optimizer | temporaries | sent a step, GB | s a step | MFU | chip-hours for 10^9 tokens |"
    order = [f"{model} {method} {name}" for model in MODELS for name in HARDWARE for method in METHODS]
    rows = [_row(*key.split(), found[key]) for key in order if key in found]
    write_section("llama", [header, "|" + "---|" * 14, *rows])
    header = "| chips | mesh | parts | GB a chip | on paper | sent a step, GB | on paper | s a step | MFU | on paper |"
    points = [_point(chips, found.get(f"scaling {chips}", {})) for chips in SIDES]
    write_section("scaling", [header, "|" + "---|" * 10, *(point["row"] for point in points)])
    draw(points)


def write_section(name: str, lines: Sequence[str]) -> None:
    """Lines in the place of those between the marks of docs/plans.md."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = PAGE.read_text().partition(begin)
    write_text_atomic(PAGE, "\n".join([before + begin, *lines, end]) + rest.partition(end)[2])


def _mesh(mesh: dict) -> str:
    return ", ".join(f"{name} {size}" for name, size in mesh.items() if size not in (None, 1)) or "one"


def _between(pair: tuple[float, float], form: str) -> str:
    low, high = (format(each, form) for each in sorted(pair))
    return low if low == high else f"{low} to {high}"


def _row(model: str, method: str, hardware: str, plan: dict) -> str:
    memory = plan["bytes_per_chip"]
    cells = [model, method, f"{hardware}, {plan['chips']} chips", _mesh(plan["mesh"])]
    cells.append(f"{plan['batch_size'] // plan['accumulate']} x {plan['accumulate']}")
    kept = plan["remat"]
    remat = None if kept is None else Remat(products=kept["products"], keep=tuple(kept["keep"]))
    cells.append(remat_name(remat))
    fits = "" if plan["fits"] else "**does not fit:** "
    cells.append(f"{fits}{memory['total'] / 1e9:.1f}")
    cells += [f"{memory[name] / 1e9:.2f}" for name in ("weights", "optimizer", "temporaries")]
    if "estimated_step_seconds" not in plan:
        return "| " + " | ".join([*cells, "", "", "", ""]) + " |"
    sent: dict[str, float] = {}
    for each in plan["collectives"]:
        label = " x ".join(each["axes"])
        sent[label] = sent.get(label, 0) + each["sent"] / 1e9
    cells.append(", ".join(f"{label} {count:.1f}" for label, count in sent.items() if count >= 0.05))
    cells.append(_between((plan["estimated_step_seconds"], plan["estimated_step_seconds_in_turn"]), ".2f"))
    cells.append(_between((plan["estimated_mfu"], plan["estimated_mfu_in_turn"]), ".0%"))
    cells.append(_between(tuple(plan["chip_hours"]), ",.0f"))
    return "| " + " | ".join(cells) + " |"


def _point(chips: int, plan: dict) -> dict:
    """Of a number of chips: what is compiled, if it is, and what paper says."""
    planned, hardware, shape = scaled(chips)
    paper = candidate_of(planned, hardware, shape)
    point = {
        "chips": chips,
        "paper": paper.paper.total,
        "paper_sent": paper.paper.sent,
        "paper_mfu": paper.paper.flops / paper.seconds / (hardware.peak_flops(planned.precision.compute) or 1),
    }
    cells = [f"{chips:,}", _mesh(dataclasses.asdict(shape)), str(planned.stage.accumulate)]
    sent_on_paper = ", ".join(f"{axis} {count / 1e9:,.0f}" for axis, count in point["paper_sent"].items())
    if "bytes_per_chip" in plan:
        point |= {"total": plan["bytes_per_chip"]["total"], "sent": {}}
        for each in plan["collectives"]:
            label = " x ".join(each["axes"])
            point["sent"][label] = point["sent"].get(label, 0) + each["sent"]
        mfu = (plan["estimated_mfu"], plan["estimated_mfu_in_turn"])
        point["mfu"] = mfu
        sent = ", ".join(f"{axis} {count / 1e9:,.0f}" for axis, count in point["sent"].items() if count > 5e8)
        seconds = _between((plan["estimated_step_seconds"], plan["estimated_step_seconds_in_turn"]), ".2f")
        cells += [f"{point['total'] / 1e9:.1f}", f"{point['paper'] / 1e9:.1f}", sent, sent_on_paper, seconds]
        cells += [_between(mfu, ".0%"), f"{point['paper_mfu']:.0%}"]
    else:
        cells += ["", f"{point['paper'] / 1e9:.1f}", "", sent_on_paper, "", "", f"{point['paper_mfu']:.0%}"]
    return point | {"row": "| " + " | ".join(cells) + " |"}


def draw(points: list[dict]) -> None:
    from cpt_jax.report.plots import new_figure

    figure, (memory, sent, mfu) = new_figure(3, 12, 3.6)
    chips, compiled = [point["chips"] for point in points], [point for point in points if "total" in point]
    memory.plot(chips, [point["paper"] / 1e9 for point in points], "--", label="on paper")
    memory.plot([p["chips"] for p in compiled], [p["total"] / 1e9 for p in compiled], "o", label="compiled")
    memory.axhline(95, color="grey", linewidth=0.8)
    memory.set(title="GB a chip", ylim=(0, 100))
    for number, axis in enumerate(("fsdp", "tensor")):
        on_paper = [point["paper_sent"].get(axis, float("nan")) / 1e9 for point in points]
        sent.plot(chips, on_paper, "--", color=f"C{number}", label=f"{axis}, on paper")
        there = [(p["chips"], p["sent"][axis] / 1e9) for p in compiled if p["sent"].get(axis, 0) > 1e9]
        if there:
            sent.plot(*zip(*there, strict=True), "o", color=f"C{number}", label=f"{axis}, compiled")
    sent.set(title="GB that a chip sends in a step", yscale="log")
    mfu.plot(chips, [100 * point["paper_mfu"] for point in points], "--", label="on paper, in turn")
    for number, label in enumerate(("collectives beside the products", "in turn")):
        values = [100 * p["mfu"][number] for p in compiled]
        mfu.plot([p["chips"] for p in compiled], values, "o", label=f"compiled, {label}")
    mfu.set(title="MFU, %, estimated", ylim=(0, 80))
    for axes in (memory, sent, mfu):
        axes.set_xscale("log", base=2)
        axes.set_xticks(chips, [f"{count:,}" for count in chips], rotation=60)
        axes.set_xlabel("chips (v5p)")
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(PICTURE, dpi=110)
    say(str(PICTURE))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["table", "scaling", "show"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of the table")
    arguments = parser.parse_args()
    quiet_libraries()
    prepare(hardware_named("cpu-1"))
    results = json.loads((RESULTS / "plans.json").read_text()) if (RESULTS / "plans.json").exists() else {}
    for part in arguments.parts:
        if part == "table":
            table(results, arguments.methods)
        else:
            {"scaling": scaling, "show": show}[part](results)
