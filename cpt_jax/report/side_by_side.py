"""Runs side by side: what sets them apart, seeds joined, the Pareto front, and the runs that one law can be of."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpt_jax.checkpoint.hub import name_of_base
from cpt_jax.core.config import short_names
from cpt_jax.laws.points import Point
from cpt_jax.report.many import RunFacts

# The share of replay, the tokens and the size stand for these where runs are set side by side.
_STOOD_FOR = re.compile(r"name|seed|stages\.\d+\.(tokens|mixture(\..*)?)")
# Runs that differ in more than this many characters say are called by their names.
LABEL = 80
_OF_A_POINT = re.compile(_STOOD_FOR.pattern + r"|base|vocabulary(\..*)?\.seed")


def differing(runs: Sequence[RunFacts]) -> dict[str, str]:
    """The settings in which runs differ: the path, and as short a name for it as is its own. What some runs lack whole,
    as a stage, is told by its kind; of what it holds, only what differs between those that have it."""
    paths = list(dict.fromkeys(path for run in runs for path in run.settings))
    apart = [
        path
        for path in paths
        if not _STOOD_FOR.fullmatch(path) and len({json.dumps(run.settings.get(path)) for run in runs}) > 1
    ]
    groups = tuple(f"{path}." for path in apart)
    apart = [
        path
        for path in apart
        if not path.startswith(groups)
        or len({json.dumps(run.settings[path]) for run in runs if path in run.settings}) > 1
    ]
    return short_names(apart)


def shown(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return Path(value).name or value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Runs that differ in their seed alone."""

    label: str
    runs: tuple[RunFacts, ...]

    def values(self, domain: str) -> list[float]:
        return [run.final[domain] for run in self.runs]

    def mean(self, domain: str) -> float:
        return sum(self.values(domain)) / len(self.runs)

    def change(self, domain: str) -> float:
        """Against the base, mean over the seeds."""
        return sum(run.final[domain] / run.base[domain] - 1 for run in self.runs) / len(self.runs)


def settings_of_runs(runs: Sequence[RunFacts]) -> list[Setting]:
    """The runs joined by setting, in the order of their first run; each is labelled by what sets it apart,
    or, where that is much, by its first run's name."""
    joined: dict[str, list[RunFacts]] = {}
    for run in runs:
        own = {path: value for path, value in run.settings.items() if path not in ("name", "seed")}
        joined.setdefault(json.dumps([own, run.parameters], sort_keys=True), []).append(run)
    groups, columns = list(joined.values()), columns_of(runs)
    labels = [
        ", ".join(f"{name} {cell(group[0])}" for name, cell in columns.items()) or group[0].name for group in groups
    ]
    if len(set(labels)) < len(labels) or max(map(len, labels)) > LABEL:
        labels = [group[0].name for group in groups]
    return [Setting(label=label, runs=tuple(group)) for label, group in zip(labels, groups, strict=True)]


def columns_of(runs: Sequence[RunFacts]) -> dict:
    """What differs between runs, by name: a function from a run to the text of its cell."""
    columns: dict[str, Any] = {}
    if len({run.replay for run in runs}) > 1:
        columns["replay"] = lambda run: f"{run.replay:.3g}" if 0 < run.replay < 0.001 else f"{100 * run.replay:.3g}%"
    if len({run.tokens for run in runs}) > 1:
        columns["tokens"] = lambda run: f"{run.tokens:,}"
    if len({run.parameters for run in runs}) > 1:
        columns["parameters"] = lambda run: "unknown" if run.parameters is None else f"{run.parameters:,}"
    for path, name in differing(runs).items():
        called = name_of_base if path == "base" else lambda value: value
        columns[name] = lambda run, path=path, called=called: shown(called(run.settings.get(path)))
    return columns


def pareto_front(settings: Sequence[Setting], new: str, old: str) -> list[Setting]:
    """The settings to which no other is at least as good on both domains and better on one, by their means, from the best
    on the new domain to the best on the old."""
    points = [(setting.mean(new), setting.mean(old)) for setting in settings]
    front = [
        setting
        for setting, (x, y) in zip(settings, points, strict=True)
        if not any(a <= x and b <= y and (a < x or b < y) for a, b in points)
    ]
    return sorted(front, key=lambda setting: (setting.mean(new), setting.mean(old)))


def alike(runs: Sequence[RunFacts]) -> tuple[list[RunFacts], list[RunFacts]]:
    """The runs that one law can be of, which differ in share, tokens, size and seed alone (of several such families, that
    with the most shares of replay), and the others."""
    rests = [
        json.dumps({path: run.settings[path] for path in sorted(run.settings) if not _OF_A_POINT.fullmatch(path)})
        for run in runs
    ]
    families = [
        _of_one_base_a_size(
            one,
            [run for run, rest in zip(runs, rests, strict=True) if rest == its_rest and _divided_alike(run, one)],
        )
        for one, its_rest in zip(runs, rests, strict=True)
    ]
    largest = max(families, key=lambda family: (len({run.planned for run in family}), len(family)))
    return largest, [run for run in runs if run not in largest]


def _of_one_base_a_size(one: RunFacts, runs: Sequence[RunFacts]) -> list[RunFacts]:
    """Those on the base of `one`, or, of another size, of the first run: models of one size differ in what they forget."""
    firsts = {one.parameters: one}
    return [run for run in runs if _of_one_base(run, firsts.setdefault(run.parameters, run))]


def _of_one_base(run: RunFacts, other: RunFacts) -> bool:
    """It may be called otherwise."""
    return run.settings["base"] == other.settings["base"] or run.base == other.base


def _divided_alike(run: RunFacts, one: RunFacts) -> bool:
    """Whether several new or several replayed domains have the same parts of what is new or replayed, to a hundredth, as in
    another run. One without any of it goes with all."""
    return all(
        not own or (own.keys() == other.keys() and all(abs(own[name] - other[name]) < 0.01 for name in own))
        for own, other in zip(run.divisions, one.divisions, strict=True)
    )


def points_of(runs: Sequence[RunFacts]) -> list[Point]:
    """The points of a law: the runs, and their bases."""
    bases = {run.base_point.size: run.base_point for run in runs}
    return [run.point for run in runs] + list(bases.values())
