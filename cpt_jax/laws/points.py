"""What runs measured, as points of a law: from a table in a file, whoever made the runs."""

import csv
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpt_jax.core.errors import UserError, nearest

# Runs whose numbers of tokens differ by no more than this were as long as each other: some ended early.
SAME_LENGTH = 1.05
COLUMNS = ("name", "size", "tokens", "share", "seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One run: the loss on each domain after `tokens` tokens, of which `share` (0 to 1) was replay.

    A point of 0 tokens is the base, before any training. `size` is the model's number of parameters, `None` where it
    is not known; losses are above 0, in any unit (bits per byte, nats a token). `planned` is the share that was asked
    for, where `share` is what was read: runs with the same differ by chance, and are one share where shares are counted.
    """

    losses: Mapping[str, float]
    tokens: float
    share: float
    planned: float | None = None
    size: float | None = None
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        where = f"point {self.name!r}" if self.name else "a point"
        if not 0 <= self.share <= 1:
            raise UserError(f"{where}: the share of replay is {self.share:g}: give 0 to 1 (0.25 is a quarter)")
        if not (self.tokens >= 0 and math.isfinite(self.tokens)):
            raise UserError(f"{where}: tokens is {self.tokens:g}: give 0 (the base) or more")
        if self.size is not None and not self.size > 0:
            raise UserError(f"{where}: size is {self.size:g}: give the number of parameters, or leave it out")
        for domain, loss in self.losses.items():
            if not (loss > 0 and math.isfinite(loss)):
                raise UserError(f"{where}: the loss on {domain!r} is {loss}: give a number above 0, or leave it empty")

    @property
    def asked(self) -> float:
        """The share that was asked for."""
        return self.share if self.planned is None else self.planned


def lengths(tokens: Sequence[float]) -> list[float]:
    """For each number of tokens the least of those that are the same length."""
    least, by_tokens = 0.0, {}
    for value in sorted(set(tokens)):
        least = value if value > SAME_LENGTH * least else least
        by_tokens[value] = least
    return [by_tokens[value] for value in tokens]


def trained(points: Sequence[Point], domain: str) -> list[Point]:
    """The points after training that have a loss on the domain.

    Raises:
      UserError: there is none.
    """
    found = [point for point in points if point.tokens > 0 and domain in point.losses]
    if not found:
        known = sorted({name for point in points for name in point.losses})
        raise UserError(f"no run has a loss on {nearest(domain, known)}; there are: {', '.join(known) or 'none'}")
    return found


def base_loss(points: Sequence[Point], domain: str, size: float | None) -> float:
    """The base's loss on a domain: that of the point with 0 tokens and this size.

    Raises:
      UserError: there is none.
    """
    bases = [point for point in points if point.tokens == 0 and domain in point.losses]
    same = [point.losses[domain] for point in bases if point.size == size] or (
        [point.losses[domain] for point in bases] if len({point.size for point in bases}) == 1 else []
    )
    if not same:
        of_size = "" if size is None else f" of size {size:g}"
        raise UserError(f"the base's loss on {domain!r}{of_size} is not known: add a row with tokens 0")
    return sum(same) / len(same)


def read_points(path: Path) -> list[Point]:
    """Points of a .csv or .jsonl file: a row a run with the columns `tokens` and `share`, `size`, `seed` and `name` if they
    are known, and one column of losses for each domain. A row of 0 tokens is the base.

    Raises:
      UserError: the file or a row of it cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path} is not there: give a .csv or .jsonl table, or runs' directories")
    if path.suffix == ".csv":
        rows: list[dict[str, Any]] = list(csv.DictReader(_text(path).splitlines(), skipinitialspace=True))
        if None in {name for row in rows for name in row}:
            raise UserError(
                f"{path} has a row with more cells than its first line has names: add names, or take cells out"
            )
    elif path.suffix == ".jsonl":
        rows = [
            _object(line, f"{path}, line {n}") for n, line in enumerate(_text(path).splitlines(), 1) if line.strip()
        ]
    else:
        raise UserError(f"{path}: give a .csv or .jsonl table, or a run's directory")
    return [_point(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: save it as UTF-8") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is no JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise UserError(f'{where} is no object: write {{"tokens": ..., "share": ..., "DOMAIN": loss}}')
    return value


def _point(row: Mapping[str, Any], where: str) -> Point:
    tokens = _number(row, "tokens", where)
    if tokens is None:
        raise UserError(f"{where} has no tokens: add the column 'tokens' (0 in the base's row)")
    share = _number(row, "share", where)
    if share is None and tokens > 0:
        raise UserError(f"{where} has no share of replay: add the column 'share' (0 to 1)")
    losses = {str(name): _number(row, name, where) for name in _domains(row)}
    seed = _number(row, "seed", where) or 0.0
    if not seed.is_integer():
        raise UserError(f"{where}: seed is {seed:g}: give a whole number, or leave it out")
    return Point(
        losses={name: loss for name, loss in losses.items() if loss is not None},
        tokens=tokens,
        share=share or 0.0,
        size=_number(row, "size", where),
        seed=int(seed),
        name=str(row.get("name") or where),
    )


def _domains(row: Mapping[str, Any]) -> Iterable[str]:
    return (name for name in row if name not in COLUMNS)


def _number(row: Mapping[str, Any], column: str, where: str) -> float | None:
    value = row.get(column)
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {column!r} is {value!r}, which is no number") from None
