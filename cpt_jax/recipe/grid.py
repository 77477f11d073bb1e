"""What a sweep is given on a command line: an experiment, or one recipe and the fields in which its runs differ."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cpt_jax.core.config import override, short_names
from cpt_jax.core.errors import UserError
from cpt_jax.data.mixture import domains_of
from cpt_jax.recipe.experiment import Runs, find_experiment, named_runs
from cpt_jax.recipe.find import find_recipe, names_one_recipe, overrides_of
from cpt_jax.recipe.recipe import Recipe, Stage

Vary = Sequence[Sequence[str]]
# As `cpt adapt` calls it: no field of a recipe, but of all its stages' mixtures.
REPLAY_SHARE = "replay_share"


class Swept(NamedTuple):
    """Runs, what they are of (a directory holds one such), and what their directory is called by default."""

    experiment: str
    name: str
    runs: Runs


def find_swept(name: str, vary: Vary = (), overrides: Sequence[str] = ()) -> Swept:
    """The runs of an experiment, or, where fields are varied, of a recipe as `cpt run` takes it: one for each combination
    of their values.

    Args:
      vary: of each field its path and its values, as in ("stages.0.optimizer.learning_rate", "1e-4", "5e-4"); "replay-share" is
        that of all replayed domains together (`replaying`).
      overrides: as `cpt run` takes them, for all runs.

    Raises:
      UserError: there is none of that name, or the fields or values make no runs that differ.
    """
    if vary:
        recipe, fields = find_recipe(name), _fields(vary)
        called = "-".join([recipe.name, *short_names([*fields]).values()])
        return Swept(f"{name} by {', '.join(fields)}", called, _grid(recipe, fields, overrides_of(overrides)))
    try:
        runs = find_experiment(name)
    except UserError:
        if names_one_recipe(name):
            raise UserError(f"{name} is one recipe: say in what its runs differ, as in --vary seed 0 1 2") from None
        raise
    given = overrides_of(overrides)
    changed = named_runs([override(recipe, *given) for recipe in runs.values()], name)
    return Swept(name, name.rpartition(":")[2], changed)


def _fields(vary: Vary) -> dict[str, Sequence[str]]:
    fields: dict[str, Sequence[str]] = {}
    for written, *values in vary:
        field = written.replace("-", "_")
        if not values:
            raise UserError(f"--vary {written} lacks its values, as in --vary seed 0 1 2")
        if field in fields:
            raise UserError(f"--vary {written} is given twice: give all its values at once")
        fields[field] = values
    return fields


def _grid(recipe: Recipe, fields: dict[str, Sequence[str]], overrides: Sequence[tuple[str, str]]) -> Runs:
    for field, _ in overrides:
        if field in (*fields, "name"):
            raise UserError(f"--{field} is given for all runs, which differ in it: leave it out")
    short, names, made = short_names([*fields]), [], []
    for values in itertools.product(*fields.values()):
        name = "-".join(f"{short[field]}-{_legible(value)}" for field, value in zip(fields, values, strict=True))
        given = dict(zip(fields, values, strict=True))
        share = given.pop(REPLAY_SHARE, None)
        run = override(recipe, *overrides, *given.items())
        run = run if share is None else replaying(run, share)
        if run in made:
            raise UserError(f"--vary: {names[made.index(run)]} and {name} are the same run: leave one out")
        names.append(name)
        made.append(run)
    if len(made) == 1:
        raise UserError(f"--vary {' '.join(fields)} makes one run, {names[0]}: give more values, or use `cpt run`")
    return named_runs([dataclasses.replace(run, name=name) for run, name in zip(made, names, strict=True)], recipe.name)


def replaying(recipe: Recipe, share: str) -> Recipe:
    """The recipe with this share of replayed tokens in each stage that replays; what is new, and what is replayed, is
    divided among domains as before.

    Raises:
      UserError: it is no share from 0 up to 1, no stage replays, or one whose shares change or follow from sizes.
    """
    try:
        old = float(share)
    except ValueError:
        old = -1.0
    if not 0 <= old < 1:
        raise UserError(f"--vary replay-share {share}: give shares from 0 up to, not including, 1")
    replayed = set(recipe.named("replay"))
    if not any(replayed.intersection(domains_of(stage.mixture)) for stage in recipe.stages):
        raise UserError(
            "--vary replay-share: no stage of this recipe replays: give one a mixture with a replayed domain"
        )
    stages = [_replaying(stage, f"stages.{n}.mixture", replayed, old) for n, stage in enumerate(recipe.stages)]
    return dataclasses.replace(recipe, stages=tuple(stages))


def _replaying(stage: Stage, field: str, replayed: set[str], share: float) -> Stage:
    mixture = stage.mixture
    if not replayed.intersection(domains_of(mixture)):
        return stage
    if not isinstance(mixture, Mapping):
        raise UserError(
            f"--vary replay-share: stage {stage.name!r} mixes by a {type(mixture).__name__}, without a share of its own: vary {field}"
        )
    before = sum(part for name, part in mixture.items() if name in replayed)
    if before > 1 - 1e-6:
        raise UserError(f"--vary replay-share: stage {stage.name!r} mixes nothing new: vary {field}")
    factors = {True: share / before, False: (1 - share) / (1 - before)}
    parts = {name: round(part * factors[name in replayed], 12) for name, part in mixture.items()}
    return dataclasses.replace(stage, mixture={name: part for name, part in parts.items() if part})


def _legible(value: str) -> str:
    """A value as it is written, without what does not belong in a file's name: {"zh": 0.95, "en": 0.05} is zh-0.95-en-0.05;
    nothing of it ([]) is none."""
    return "-".join(re.findall(r"[\w.+%-]+", value)) or "none"
