"""Many runs of one experiment in one directory: what is done is skipped, what fails takes nothing else along."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import clock, number_of, quiet_libraries, say
from cpt_jax.core.stores import Location, is_address, write_json
from cpt_jax.recipe.grid import Vary, find_swept
from cpt_jax.recipe.recipe import Recipe
from cpt_jax.sweep.directory import SweepDirectory
from cpt_jax.training.trackers import TrackerName, check_packages

Together = Literal["auto", "never"] | int
AtOnce = Literal["auto"] | int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manner:
    """How the runs of a sweep are brought through.

    together: how many may be one program at most; "auto": as many as there is memory for, on a CPU one. at_once: how many processes,
    each with a run of its own; "auto": by memory and cores. queue: a batch system that gets a job a run, with
    `queue_arguments` of its own. exports: each run with its export, samples and report. update: go on with changed
    recipes. track: where the figures of training go besides.
    """

    together: Together = "auto"
    at_once: AtOnce = 1
    queue: Literal["slurm", "skypilot"] | None = None
    queue_arguments: tuple[str, ...] = ()
    exports: bool = False
    update: bool = False
    track: tuple[TrackerName, ...] = ()

    def __post_init__(self) -> None:
        for field in ("together", "at_once"):
            value = getattr(self, field)
            if isinstance(value, int) and value < 1:
                raise UserError(f"--{field.replace('_', '-')} is {value}: give at least 1")
        if self.at_once != 1 and isinstance(self.together, int) and self.together > 1:
            raise UserError("--at-once runs each run in a process of its own: leave out --together, or --at-once")
        if self.queue is not None and self.at_once != 1:
            raise UserError("--queue leaves it to the queue how many run at once: leave out --at-once")
        if self.queue_arguments and self.queue is None:
            raise UserError("--queue-arguments are for a queue: give --queue slurm or skypilot")
        if self.queue is None:
            check_packages(self.track)

    @property
    def only(self) -> str | None:
        """As `run` takes it."""
        return None if self.exports else "train"

    def most_together(self) -> int | None:
        """None: as many as there is memory for. On CPUs "auto" is one: products of many small matrices are slower there
        than the same products one by one (LOG.md)."""
        import jax

        if self.queue is not None or self.at_once != 1 or self.together == "never":
            return 1
        if self.together == "auto":
            return 1 if jax.default_backend() == "cpu" else None
        return self.together


def sweep(
    experiment: str,
    workdir: Location | None,
    manner: Manner,
    *,
    vary: Vary = (),
    overrides: Sequence[str] = (),
    dry_run: bool = False,
    json_path: Location | None = None,
) -> bool:
    """Runs an experiment, or a recipe with each combination of the values that fields are given (`vary`), in a directory;
    called again, it goes on. Ends with a table, sweep.json and the report over all runs. Whether no run has failed.

    Raises:
      Preempted: it was asked to end by SIGTERM; all that was done is kept.
      UserError: no such experiment, no such field or value (`find_swept`), or the directory is another one's.
    """
    quiet_libraries()
    experiment, name, recipes = find_swept(experiment, vary, overrides)
    _check_exports(recipes, manner)
    location = workdir or Path("runs") / name
    if is_address(location) and manner.queue != "skypilot":
        raise UserError(f"--workdir {location}: a sweep's directory is on a disk, except with --queue skypilot")
    if dry_run:
        with SweepDirectory(location, experiment, recipes, claim=False) as directory:
            print("\n".join(planned(directory, recipes, manner)))
        return True
    with SweepDirectory(location, experiment, recipes) as directory:
        left = directory.left(manner.exports)
        if done := len(recipes) - len(left):
            say(f"sweep: {done} of {len(recipes)} runs are done")
        _bring_through(directory, left, manner)
        print(directory.table())
        _report(directory)
        if json_path is not None:
            write_json(json_path, directory.content())
        failed = directory.failed()
    for run, error in failed.items():
        say(f"sweep: run {run} failed: {error}")
    return not failed


def _check_exports(recipes: dict[str, Recipe], manner: Manner) -> None:
    """Raises a UserError where a run's result would come to be in an export that is not made."""
    mixed = [name for name, recipe in recipes.items() if recipe.export.interpolate_base]
    if mixed and not manner.exports:
        raise UserError(
            f"run {mixed[0]!r} is averaged with its base when it is exported (export.interpolate_base): add --exports"
        )


def _report(directory: SweepDirectory) -> None:
    """The page over the runs; where they make none, their figures stay what they are."""
    try:
        page = directory.report()
    except UserError as error:
        say(f"sweep: no report: {error}")
        return
    if page is not None:
        print(f"\nreport: {page}")


def _bring_through(directory: SweepDirectory, left: dict[str, Recipe], manner: Manner) -> None:
    if not left and manner.queue is None:
        return
    if manner.queue is not None:
        from cpt_jax.sweep.queues import submit

        submit(directory, left, manner)
    elif manner.at_once != 1:
        from cpt_jax.sweep.at_once import run_at_once

        run_at_once(directory, left, manner)
    else:
        _here(directory, left, manner)


def _here(directory: SweepDirectory, left: dict[str, Recipe], manner: Manner) -> None:
    """In this process: one after the other, or several as one program."""
    from cpt_jax.sweep.groups import groups_of, run_group
    from cpt_jax.training.guard import ends_when_asked

    pace = Pace(list(left.values()))
    with ends_when_asked():
        most = manner.most_together()
        for names in groups_of(left, most):
            say(f"sweep: {_told(names, list(directory.recipes))}{pace.left()}")
            started = time.monotonic()
            for name in names:
                directory.begun_now(name)

            def failed(name: str, error: Exception) -> None:
                directory.failed_now(name, error)

            def done(name: str, started: float = started, count: int = len(names)) -> None:
                directory.done_now(name, (time.monotonic() - started) / count, manner.exports)

            run_group(
                {name: left[name] for name in names},
                directory.run,
                shared=directory.shared,
                only=manner.only,
                update=manner.update,
                most=most,
                track=manner.track,
                on_failure=failed,
                on_done=done,
            )
            for name in names:
                pace.ended(left[name], failed=name in directory.failed())


def command_of(directory: SweepDirectory, name: str, manner: Manner) -> tuple[str, str, list[str]]:
    """How a process of its own is told to do a run: (command of `cpt`, recipe, flags beside --workdir and --shared)."""
    flags = ["--update"] if manner.update else []
    flags += ["--track", *manner.track] if manner.track else []
    return "run" if manner.exports else "train", directory.write_recipe(name), flags


def _told(names: Sequence[str], whole: Sequence[str]) -> str:
    numbers = [whole.index(name) + 1 for name in names]
    if len(names) == 1:
        return f"run {numbers[0]} of {len(whole)}, {names[0]}"
    return f"runs {', '.join(map(str, numbers))} of {len(whole)}, as one program where memory allows"


class Pace:
    """The time left of a sweep, by the tokens that are trained."""

    def __init__(self, recipes: Sequence[Recipe], clock_: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started = clock_, clock_()
        self._whole, self._done = sum(map(_tokens, recipes)), 0

    def ended(self, recipe: Recipe, *, failed: bool) -> None:
        """A run that has failed is no work any more, and was none that tells the pace."""
        if failed:
            self._whole -= _tokens(recipe)
        else:
            self._done += _tokens(recipe)

    def left(self) -> str:
        """ "; 3 min 20 s left", or nothing as long as nothing is done."""
        if not self._done:
            return ""
        return f"; {clock((self._clock() - self._started) / self._done * (self._whole - self._done))} left"


def _tokens(recipe: Recipe) -> int:
    # A run without training takes its time, too.
    return sum(stage.tokens for stage in recipe.stages) or 1


def planned(directory: SweepDirectory, recipes: dict[str, Recipe], manner: Manner) -> list[str]:
    """What a sweep would do, a line a run."""
    from cpt_jax.sweep.groups import groups_of

    done = {name for name in recipes if directory.is_done(name, manner.exports)}
    left = {name: recipe for name, recipe in recipes.items() if name not in done}
    lines = [f"{number_of(len(recipes), 'run')} in {directory.location}, {len(done)} of them done"]
    lines += [f"  {name}: done" for name in recipes if name in done]
    if manner.queue is not None:
        return lines + [f"  a job on {manner.queue}: {name}" for name in left]
    if manner.at_once != 1:
        return lines + [f"  in a process of its own: {name}" for name in left]
    for names in groups_of(left, manner.most_together()):
        if len(names) > 1:
            lines.append(f"  together, as memory allows ({len(names)}): {', '.join(names)}")
        else:
            lines.append(f"  alone: {names[0]}")
    return lines
