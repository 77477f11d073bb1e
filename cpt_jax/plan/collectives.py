"""The collectives of a compiled program: how many bytes go along which axes of the mesh."""

import dataclasses
import re
from collections import defaultdict

import numpy as np

from cpt_jax.plan.hlo import Computation, Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """Exchanges of one kind along the same axes in one step.

    axes: of the mesh; devices: that exchange with each other; count: how often it runs; payload: bytes of the whole
    array, of all runs; sent: bytes that a device sends, around a ring (all-reduce: 2 (n-1)/n of the array, gather and
    scatter: (n-1)/n); largest: bytes of the largest array.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    count: int
    payload: float
    sent: float
    largest: int


def collectives(program: Program, mesh_shape: dict[str, int]) -> list[Collective]:
    """All of a program for a mesh, the largest first.

    A gather that a TPU's compiler cuts into steps, each fused with a product, is found in all of them and counted once.
    """
    found: dict[tuple[str, tuple[str, ...], int], list[tuple[float, int, float]]] = defaultdict(list)
    chains: dict[str, float] = {}
    for name, instruction, times in program.walk():
        kind = instruction.op.removesuffix("-start")
        if kind not in KINDS:
            continue
        computation = program.computations[name]
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        if chain is not None:
            if chain.group(1) in chains:
                continue
            chains[chain.group(1)] = times
        axes, devices = axes_of(instruction, mesh_shape)
        if devices == 1:
            continue
        given = sum(computation[operand].bytes for operand in instruction.operands if operand in computation)
        if kind == "all-reduce" and _scatters(computation, given, devices):
            kind = "reduce-scatter"
        whole = given * devices if kind == "all-gather" else given
        found[kind, axes, devices].append((times, whole, times * _sent(kind, whole, devices)))
    return sorted(
        (
            Collective(
                kind=kind,
                axes=axes,
                devices=devices,
                count=round(sum(times for times, _, _ in each)),
                payload=sum(times * whole for times, whole, _ in each),
                sent=sum(sent for _, _, sent in each),
                largest=max(whole for _, whole, _ in each),
            )
            for (kind, axes, devices), each in found.items()
        ),
        key=lambda each: -each.sent,
    )


def _sent(kind: str, whole: int, devices: int) -> float:
    share = (devices - 1) / devices
    return {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share) * whole


def _scatters(computation: Computation, given: int, devices: int) -> bool:
    """Whether an all-reduce is fused with the choice of this device's part, which a TPU makes a reduce-scatter."""
    result = next(each for each in computation.values() if each.root)
    return len(computation) < 40 and result.op != "tuple" and 0 < result.bytes <= given / devices * 1.01


def axes_of(instruction: Instruction, mesh_shape: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """(the mesh's axes that a collective goes along, how many devices exchange)."""
    groups = _groups(instruction.attributes, int(np.prod(list(mesh_shape.values()))))
    sizes = list(mesh_shape.values())
    varying = np.zeros(len(sizes), bool)
    for group in groups[:64]:
        places = np.asarray(np.unravel_index(np.asarray(group), sizes))
        varying |= (places != places[:, :1]).any(1)
    axes = tuple(name for name, varies in zip(mesh_shape, varying, strict=True) if varies)
    if instruction.op.startswith("collective-permute"):
        return axes, int(np.prod([mesh_shape[name] for name in axes])) if axes else 1
    return axes, max((len(group) for group in groups), default=1)


def _groups(attributes: str, devices: int) -> list[list[int]]:
    """Who exchanges with whom, of every way in which HLO writes it."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        numbers = [int(number) for number in re.findall(r"\d+", pairs.group(1))]
        return [list(pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
    if listed := re.search(r"replica_groups=\{\{(.*?)\}\}", attributes):
        return [[int(number) for number in group.split(",")] for group in listed.group(1).split("},{")]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, sizes, order = ([int(n) for n in part.split(",")] if part else [] for part in iota.groups())
        ids = np.arange(int(np.prod(sizes))).reshape(sizes)
        return (ids.transpose(order) if order else ids).reshape(shape).tolist()
    if "replica_groups=mesh[" in attributes:
        return _mesh_groups(attributes)
    return [list(range(devices))]


_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}")


def _mesh_groups(attributes: str) -> list[list[int]]:
    """Groups along axes of a mesh of their own: mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(1)2}; the last
    is the part of size 2 behind parts of size 1 of axis b."""
    found = _MESH.search(attributes)
    if found is None:
        raise ValueError(f"replica groups that are not known: {attributes[:200]}")
    named, shape, order, along = found.groups()
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named)}
    sizes = [int(size) for size in shape.split(",")] if shape else [int(np.prod(list(axes.values())))]
    ids = np.arange(int(np.prod(sizes))).reshape(sizes)
    if order:
        ids = ids.transpose([int(axis) for axis in order.split(",")])
    parts, chosen = [], []
    for name, size in axes.items():
        inner = re.search(rf"'{re.escape(name)}'(?::\((\d+)\)(\d+))?", along)
        before, own = (int(inner.group(1)), int(inner.group(2))) if inner and inner.group(1) else (1, size)
        if inner is not None:
            chosen.append(len(parts) + 1)
        parts += [before, own, size // before // own]
    ids = ids.reshape(parts)
    others = [axis for axis in range(len(parts)) if axis not in chosen]
    return ids.transpose(others + chosen).reshape(-1, int(np.prod([parts[axis] for axis in chosen]))).tolist()
