"""The plan of a stage: what its compiled step takes, in figures and in words."""

import dataclasses

from cpt_jax.core.progress import number_of
from cpt_jax.plan.collectives import Collective, collectives
from cpt_jax.plan.hardware import Hardware
from cpt_jax.plan.hlo import parse
from cpt_jax.plan.memory import ChipMemory, chip_memory
from cpt_jax.plan.paper import PaperStep, on_paper
from cpt_jax.plan.roofline import Roofline, roofline
from cpt_jax.plan.stage import CompiledStage, PlannedStage, compile_stage
from cpt_jax.report.tables import text_table
from cpt_jax.sharding.hardware import compiling_for
from cpt_jax.sharding.mesh import AXES, MeshShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A stage on a mesh of some hardware; without `roofline` where the compiler found no room.

    Args:
      price: of a chip's hour.
    """

    compiled: CompiledStage
    memory: ChipMemory
    collectives: list[Collective]
    roofline: Roofline | None
    paper: PaperStep
    price: float | None = None

    @property
    def fits(self) -> bool:
        limit = self.memory.limit
        return self.compiled.refusal is None and (limit is None or self.memory.total <= limit)

    @property
    def step_seconds(self) -> tuple[float, float] | None:
        """With collectives beside the products, and with one after the other."""
        line = self.roofline
        if line is None or line.overlapped is None or line.in_turn is None:
            return None
        return line.overlapped, line.in_turn

    def figures(self) -> dict:
        """As `cpt plan --json` writes them."""
        stage, hardware, line = self.compiled.planned.stage, self.compiled.hardware, self.roofline
        seconds = self.step_seconds
        found = {
            "stage": stage.name,
            "method": type(stage.method).__name__,
            "hardware": hardware.name,
            "device": hardware.kind,
            "chips": hardware.chips,
            "compiled_for": hardware.platform,
            "mesh": {name: self.compiled.mesh.shape[name] for name in AXES},
            "batch_size": stage.batch_size,
            "sequence_length": stage.sequence_length,
            "accumulate": stage.accumulate,
            "remat": None if stage.remat is None else dataclasses.asdict(stage.remat),
            "attention": self.compiled.network.config.attention,
            "layer_loop": self.compiled.network.config.layer_loop,
            "fits": self.fits,
            "refusal": self.compiled.refusal,
            "bytes_per_chip": self.memory._asdict() | {"total": self.memory.total},
            "collectives": [dataclasses.asdict(each) for each in self.collectives],
            "on_paper": dataclasses.asdict(self.paper) | {"total": self.paper.total},
            "tokens": stage.tokens,
            "steps": stage.steps,
            "compile_seconds": round(self.compiled.seconds, 1),
        }
        if line is not None:
            found |= {
                "flops_per_step": line.model_flops * hardware.chips,
                "compiled_flops_per_chip": line.flops,
                "memory_traffic_per_chip": line.bytes,
                "local_seconds": line.local,
                "exchange_seconds": line.exchange,
            }
        if seconds is not None and line is not None:
            hours = [each * stage.steps / 3600 for each in seconds]
            found |= {
                "estimated_step_seconds": seconds[0],
                "estimated_step_seconds_in_turn": seconds[1],
                "estimated_mfu": line.mfu(seconds[0]),
                "estimated_mfu_in_turn": line.mfu(seconds[1]),
                "hours": hours,
                "chip_hours": [each * hardware.chips for each in hours],
            }
            if self.price is not None:
                found["cost"] = [each * hardware.chips * self.price for each in hours]
        return found


def plan_stage(
    planned: PlannedStage, hardware: Hardware, shape: MeshShape | None = None, price: float | None = None
) -> StagePlan:
    """Compiles a stage and reads the program.

    Raises:
      UserError: see `compile_stage`.
    """
    compiled = compile_stage(planned, hardware, shape)
    mesh_shape = {name: compiled.mesh.shape[name] for name in AXES}
    program = parse(compiled.text) if compiled.text else None
    found = [] if program is None else collectives(program, mesh_shape)
    with compiling_for(hardware.platform):
        memory = chip_memory(compiled, program)
    return StagePlan(
        compiled=compiled,
        memory=memory,
        collectives=found,
        roofline=None if program is None else roofline(compiled, program, found),
        paper=on_paper(planned, MeshShape(**mesh_shape), hardware.platform),
        price=price,
    )


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count / 1e3:,.1f} kB"


def explain(plan: StagePlan) -> str:
    """The plan in words, as `cpt plan` prints it."""
    compiled, memory, stage = plan.compiled, plan.memory, plan.compiled.planned.stage
    hardware, config = compiled.hardware, compiled.network.config
    mesh = ", ".join(f"{name} {count}" for name, count in compiled.mesh.shape.items() if count > 1) or "one device"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    if memory.limit is None:
        verdict = "compiled (the device's memory is not known)"
    lines = [
        f"stage {stage.name}: {verdict}: {size(memory.total)} of {'?' if memory.limit is None else size(memory.limit)} a device",
        f"  {hardware.name}: {hardware.chips} x {hardware.kind}; mesh {mesh}; {stage.batch_size} rows of {stage.sequence_length:,} a step"
        + (f" in {stage.accumulate} parts" if stage.accumulate > 1 else "")
        + f"; attention {config.attention}, layers {config.layer_loop}; compiled in {compiled.seconds:.0f} s",
    ]
    if hardware.platform == "gpu":
        lines.append(
            "  attention by plain blocks, its products on paper: cuDNN's kernel cannot be compiled without a GPU"
        )
    if compiled.refusal is not None:
        lines.append(f"  the compiler: {compiled.refusal}")
    lines.append(_indented(text_table(_memory_rows(memory, compiled.refusal is not None))))
    if len(rows := _collective_rows(plan)) > 1:
        lines.append(_indented(text_table(rows)))
    elif plan.collectives:
        lines.append("  collectives: each sends less than 1 MB a step")
    line, seconds = plan.roofline, plan.step_seconds
    if line is not None:
        lines.append(
            f"  a step: {_short(line.model_flops * hardware.chips / 1e12)} TFLOP of the model; a device computes {_short(line.flops / 1e12)} TFLOP and moves {size(line.bytes)}"
        )
    if line is not None and seconds is not None:
        exchange = ", ".join(f"{axes} {each:.3f} s" for axes, each in line.exchange.items()) or "none"
        tokens = stage.batch_size * stage.sequence_length
        first, last = (f"{each:.3f} s, MFU {line.mfu(each):.1%}, {tokens / each:,.0f} tokens/s" for each in seconds)
        lines += [
            f"  estimate (roofline, no step was run): operations {line.local:.3f} s; collectives {exchange}",
            f"    all collectives beside the operations: {first}",
            f"    one after the other: {last}",
            f"  {stage.tokens:,} tokens, {number_of(stage.steps, 'step')}: {_long(plan)}",
        ]
    return "\n".join(lines)


def _memory_rows(memory: ChipMemory, refused: bool) -> list[tuple[str, str]]:
    parts = memory._asdict()
    limit = parts.pop("limit")
    rows = [
        (name, size(parts[name])) for name in ("weights", "optimizer", "ema", "batch", "padding") if parts[name] > 1e3
    ]
    rows.append(("temporaries" + (" (needed)" if refused else ""), size(memory.temporaries)))
    rows += [(f"  of them {name}", size(parts[name])) for name in ("activations", "gradients", "logits")]
    rows.append(("total", size(memory.total)))
    if limit is not None:
        rows.append(("the device's", size(limit)))
    return [("memory of a device", ""), *rows]


def _collective_rows(plan: StagePlan) -> list[tuple[str, ...]]:
    rows = [("collective", "axes", "devices", "times", "largest", "sent a step", "on paper")]
    paper = dict(plan.paper.sent)
    for each in plan.collectives:
        if each.sent < 1e6:
            continue
        axes = " x ".join(each.axes)
        on_paper = paper.pop(axes, None)
        rows.append(
            (
                each.kind,
                axes,
                str(each.devices),
                f"{each.count:,}",
                size(each.largest),
                size(each.sent),
                "" if on_paper is None else f"{size(on_paper)} (all of {axes})",
            )
        )
    return rows


def _long(plan: StagePlan) -> str:
    figures = plan.figures()
    times, chip_hours = (" to ".join(map(_short, figures[name])) for name in ("hours", "chip_hours"))
    cost = "" if plan.price is None else ", cost " + " to ".join(f"{each:,.2f}" for each in figures["cost"])
    return f"{times} hours, {chip_hours} chip-hours{cost}"


def _short(number: float) -> str:
    """At least two digits, and no exponent of large ones."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
