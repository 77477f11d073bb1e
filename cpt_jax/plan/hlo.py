"""A compiled program's text (HLO): its computations, how often each runs, and how large its arrays are."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator

ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape; `space` 0 is the device's main memory, others are caches, counters, or the host's."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * _bits(self.dtype) // 8


@functools.cache
def _bits(dtype: str) -> int:
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return ITEM_BITS[dtype] if dtype in ITEM_BITS else int(digits.group(1)) if digits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation. `attributes` is the text behind its operands."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        found = []
        for dtype, dims, layout in _ARRAY.findall(self.shape):
            space = re.search(r"S\((\d+)\)", layout)
            found.append(Array(dtype, tuple(int(d) for d in dims.split(",") if d), int(space.group(1)) if space else 0))
        return tuple(found)

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    def called(self) -> list[str]:
        """The computations that it runs, but for those of a few numbers (a reduction's addition)."""
        if self.op in ("reduce", "reduce-window", "scatter", "sort", "select-and-scatter", "map") or self.op.startswith(
            ("all-reduce", "reduce-scatter")
        ):
            return []
        branches = _BRANCHES.search(self.attributes)
        return _CALLED.findall(self.attributes) + (_NAME.findall(branches.group(1)) if branches else [])

    @property
    def op_name(self) -> str:
        """The name that JAX gave it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name; the first to run is `entry`."""

    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def runs(self) -> dict[str, float]:
        """How often each computation runs in one step; of a condition's branches, each as if it were taken."""
        runs: dict[str, float] = defaultdict(float)

        def visit(name: str, times: float) -> None:
            runs[name] += times
            for instruction in self.computations[name].values():
                for called in instruction.called():
                    if called in self.computations:
                        trips = self.trips(instruction, name) if instruction.op == "while" else 1
                        visit(called, times * trips)

        visit(self.entry, 1.0)
        return dict(runs)

    def trips(self, loop: Instruction, within: str) -> int:
        """How often a loop's body runs: as the compiler notes it, or as its condition counts; 1 where neither tells."""
        if known := _TRIPS.search(loop.attributes):
            return int(known.group(1))
        names = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", loop.attributes))
        condition, body = (self.computations[names[part]] for part in ("condition", "body"))
        limit, index = _limit(condition)
        if limit is None:
            return 1
        begin, step = 0, 1
        if index is not None:
            begin = self._element(self.computations[within], loop.operands[0], index) or 0
            step = self._step(body, index)
        return max(1, -(-(limit - begin) // step))

    def _element(self, computation: Computation, name: str, index: int) -> int | None:
        """The constant that is an element of a tuple."""
        made = computation.get(name)
        if made is None or made.op != "tuple" or index >= len(made.operands):
            return None
        return _constant(computation, made.operands[index])

    def _step(self, body: Computation, index: int) -> int:
        result = next(each for each in body.values() if each.root)
        if result.op != "tuple":
            return 1
        added = body.get(result.operands[index])
        if added is None or added.op != "add":
            return 1
        constants = [_constant(body, name) for name in added.operands]
        return next((value for value in constants if value), 1)

    def walk(self) -> Iterator[tuple[str, Instruction, float]]:
        """(computation, instruction, how often it runs) of all that runs."""
        for name, times in self.runs.items():
            for instruction in self.computations[name].values():
                yield name, instruction, times


def _constant(computation: Computation, name: str) -> int | None:
    while (made := computation.get(name)) is not None and made.op in ("copy", "bitcast", "convert"):
        name = made.operands[0]
    if made is None or made.op != "constant":
        return None
    value = re.match(r"\s*(-?\d+)", made.attributes)
    return int(value.group(1)) if value else None


def _limit(condition: Computation) -> tuple[int | None, int | None]:
    """What a loop's counter stays below, and which element of the loop's tuple it is."""
    result = next(each for each in condition.values() if each.root)
    constants = {name: _constant(condition, name) for name, each in condition.items() if each.op == "constant"}
    if result.op == "compare" and "direction=LT" in result.attributes:
        counter = condition.get(result.operands[0])
        index = re.search(r"index=(\d+)", counter.attributes) if counter is not None else None
        return constants.get(result.operands[1]), int(index.group(1)) if index else None
    # A fusion that compares: the condition has no other number.
    values = [value for value in constants.values() if value is not None]
    return (values[0] if len(values) == 1 else None), None


def parse(text: str) -> Program:
    """The program of a compiled module's text (`compiled.as_text()`)."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and line.endswith("{"):
            name = line.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0].split("(", 1)[0]
            current = computations[name] = {}
            if line.startswith("ENTRY "):
                entry = name
        elif line.startswith("  ") and " = " in line:
            instruction = _instruction(line.strip())
            current[instruction.name] = instruction
    return Program(computations, entry)


def _instruction(line: str) -> Instruction:
    root = line.startswith("ROOT ")
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    op, _, rest = rest.partition("(")
    close = _closing("(" + rest) - 1
    operands, attributes = rest[: close - 1], rest[close:]
    if op == "constant":
        attributes = operands + " " + attributes
    if op == "parameter":
        attributes = f"index={operands} " + attributes
    return Instruction(name.lstrip("%"), shape, op, tuple(_NAME.findall(operands)), attributes, root)


def _closing(text: str) -> int:
    """Where the parenthesis that a text begins with is closed, one behind it."""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return position + 1
    return len(text)
