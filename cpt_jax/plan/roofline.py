"""How long a step takes at best: each operation of the compiled program by its products and its bytes, and each
collective by its axis (the roofline model: Williams, Waterman & Patterson 2009)."""

import re
from typing import NamedTuple

import numpy as np

from cpt_jax.plan.collectives import KINDS, Collective
from cpt_jax.plan.hlo import Computation, Instruction, Program
from cpt_jax.plan.stage import CompiledStage
from cpt_jax.training.flops import attention_flops, token_flops

# Nothing is read or written.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "copy-done", "iota",
}  # fmt: skip
# Splash attention's kernels, and how many products of queries with keys each makes.
_KERNELS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


class Roofline(NamedTuple):
    """Of one device and one step. flops: of products, as compiled; bytes: of main memory, read and written; local:
    seconds of all operations, each by the slower of the two; exchange: seconds of the collectives, by axes.

    Seconds are None where the device is not known.
    """

    flops: float
    bytes: float
    model_flops: float
    local: float | None
    exchange: dict[str, float]
    peak: float | None

    @property
    def overlapped(self) -> float | None:
        """Seconds a step, if collectives run beside the products."""
        return None if self.local is None else max(self.local, sum(self.exchange.values()))

    @property
    def in_turn(self) -> float | None:
        """Seconds a step, if they run one after the other."""
        return None if self.local is None else self.local + sum(self.exchange.values())

    def mfu(self, seconds: float | None) -> float | None:
        return None if seconds is None or self.peak is None else self.model_flops / seconds / self.peak


def roofline(compiled: CompiledStage, program: Program, found: list[Collective]) -> Roofline:
    hardware, stage = compiled.hardware, compiled.planned.stage
    peak, chip = hardware.peak_flops(compiled.planned.precision.compute), hardware.chip
    per_token = token_flops(compiled.network, compiled.planned.method.trains, stage.sequence_length).total
    fused = {name for _, each, _ in program.walk() if each.op == "fusion" for name in each.called()}
    flops, moved, local = 0.0, 0.0, 0.0
    for name, instruction, times in program.walk():
        if name in fused or instruction.op in _FREE or instruction.op.removesuffix("-start") in KINDS:
            continue
        computation = program.computations[name]
        products = _flops(program, computation, instruction) + _kernel_flops(compiled, instruction)
        bytes_ = moved_bytes(program, computation, instruction)
        flops, moved = flops + times * products, moved + times * bytes_
        if peak is not None and chip is not None:
            local += times * max(products / peak, bytes_ / chip.memory_bandwidth)
    exchange: dict[str, float] = {}
    for each in found:
        label = " x ".join(each.axes)
        exchange[label] = exchange.get(label, 0.0) + each.sent / hardware.bandwidth(compiled.mesh, each.axes)
    if compiled.network.config.attention not in ("splash", "xla"):
        # Blocks' loops end where the data says, and other kernels are not in this program: as on paper.
        paper = _attention_flops(compiled, 1) * 3 * sum(kind.attends for kind in compiled.network.config.kind_of_layer)
        flops, local = flops + paper, local + (0.0 if peak is None else paper / peak)
    known = peak is not None and chip is not None
    return Roofline(
        flops=flops,
        bytes=moved,
        model_flops=per_token * stage.batch_size * stage.sequence_length / hardware.chips,
        local=local if known else None,
        exchange=exchange if known else {},
        peak=peak,
    )


def products(program: Program) -> float:
    """FLOPs of all products of a program, those of kernels left out."""
    return sum(
        times * _flops(program, program.computations[name], each)
        for name, each, times in program.walk()
        if _is_product(each)
    )


def _flops(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Of the products in an operation, fused ones too."""
    if instruction.op == "fusion":
        inner = [program.computations[name] for name in instruction.called() if name in program.computations]
        return sum(_flops(program, each, part) for each in inner for part in each.values())
    if not _is_product(instruction):
        return 0.0
    left, right = (computation[name].arrays[0].dims for name in instruction.operands[:2])
    out = 1.0
    for size in instruction.arrays[0].dims:
        out *= size
    contracted = 1.0
    if instruction.op == "convolution":
        contracted = _contracted(instruction, left, right)
    else:
        axes = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)', instruction.attributes)
        for axis in re.findall(r"\d+", axes.group(1)) if axes else []:
            contracted *= left[int(axis)]
    return 2.0 * out * contracted


def _is_product(instruction: Instruction) -> bool:
    """A product, also one that a GPU's compiler leaves to cuBLAS."""
    return instruction.op in ("dot", "convolution") or (
        instruction.op == "custom-call" and 'custom_call_target="__cublas$' in instruction.attributes
    )


def _contracted(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """How many products a convolution adds up for a number of its result, on average: those with padding are left out
    (a TPU's compiler writes a product of parts that arrive one by one so)."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 1.0
    of_left, of_right, of_out = labels.groups()
    window = {name: text.split("x") for name, text in re.findall(r"(\w+)=([\w-]+)", _window(instruction))}
    total = float(right[of_right.index("i")])
    for spatial in sorted(set(of_right) - {"i", "o"}):
        length, size = left[of_left.index(spatial)], right[of_right.index(spatial)]
        out, number = instruction.arrays[0].dims[of_out.index(spatial)], int(spatial)

        def setting(name: str, default: int, number: int = number) -> int:
            return int(window[name][number].split("_")[0]) if name in window else default

        stride, spread, apart = setting("stride", 1), setting("lhs_dilate", 1), setting("rhs_dilate", 1)
        places = np.arange(out)[:, None] * stride + np.arange(size)[None, :] * apart - setting("pad", 0)
        inside = (places >= 0) & (places <= (length - 1) * spread) & (places % spread == 0)
        total *= float(inside.sum()) / out
    return total


def _window(instruction: Instruction) -> str:
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    return found.group(1) if found else ""


def _kernel_flops(compiled: CompiledStage, instruction: Instruction) -> float:
    """Of an attention kernel, whose products are not in the text: of a causal row, the half."""
    if instruction.op != "custom-call":
        return 0.0
    return next(
        (
            _attention_flops(compiled, count / 2)
            for name, count in _KERNELS.items()
            if name in instruction.name + instruction.attributes
        ),
        0.0,
    )


def _attention_flops(compiled: CompiledStage, passes: float) -> float:
    """Of one layer's scores and mixtures on one device, `passes` times."""
    stage, config = compiled.planned.stage, compiled.network.config
    of_layers = [flops for flops in attention_flops(config, stage.sequence_length) if flops] or [0.0]
    tokens = stage.batch_size // stage.accumulate * stage.sequence_length / compiled.hardware.chips
    return passes * sum(of_layers) / len(of_layers) * tokens


def moved_bytes(program: Program, computation: Computation, instruction: Instruction) -> float:
    """What an operation reads from and writes to main memory."""
    operands = [computation[name] for name in instruction.operands if name in computation]
    read = [sum(array.bytes for array in each.arrays if array.space == 0) for each in operands]
    # cuBLAS has a workspace behind its product.
    arrays = instruction.arrays[:1] if _is_product(instruction) else instruction.arrays
    written = float(sum(array.bytes for array in arrays if array.space == 0))
    if instruction.op in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    if instruction.op == "dynamic-update-slice":
        return 2.0 * (read[1] if len(read) > 1 else 0)
    if instruction.op in ("copy-start", "slice-start", "async-start", "dynamic-slice-start"):
        # The result, and the source once more in the same tuple.
        return float(min(written, sum(read)) if sum(read) else written)
    if instruction.op.endswith("-done"):
        return 0.0
    if instruction.op == "fusion" and (called := instruction.called()) and called[0] in program.computations:
        return _fusion_bytes(program, program.computations[called[0]], read, written)
    return sum(read) + written


def _fusion_bytes(program: Program, inner: Computation, read: list[int], written: float) -> float:
    """A fusion reads of an operand what it slices out of it, and writes into one what it updates."""
    for number, name in _parameters(inner).items():
        if number < len(read):
            read[number] = min(read[number], _sliced(program, inner, name))
    for each in inner.values():
        if each.op == "dynamic-update-slice" and (each.root or each.bytes > 0.5 * written > 0):
            written -= each.bytes - inner[each.operands[1]].bytes
    return sum(read) + max(0.0, written)


def _parameters(inner: Computation) -> dict[int, str]:
    """The names of a fusion's operands within it, by their place."""
    found = {each.name: re.match(r"index=(\d+)", each.attributes) for each in inner.values() if each.op == "parameter"}
    return {int(index.group(1)): name for name, index in found.items() if index is not None}


def _sliced(program: Program, inner: Computation, name: str) -> int:
    """Bytes that are read of a value: what is sliced out of it, also by fusions within the fusion, or all of it."""
    whole, total = inner[name].bytes, 0
    for user in (each for each in inner.values() if name in each.operands):
        if user.op in ("dynamic-slice", "slice", "gather"):
            total += user.bytes
        elif user.op == "bitcast" and not user.root:
            total += _sliced(program, inner, user.name)
        elif user.op == "fusion" and (called := program.computations.get(user.called()[0])) is not None:
            within = _parameters(called)
            total += sum(_sliced(program, called, within[at]) for at, each in enumerate(user.operands) if each == name)
        elif user.op != "dynamic-update-slice" or user.operands[0] != name:
            return whole
    return min(whole, total)
