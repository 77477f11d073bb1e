"""Runs of a sweep that one program trains: which these are, how many at once, and how they are brought through."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpt_jax.core import processes
from cpt_jax.core.config import fingerprint, to_json
from cpt_jax.core.errors import Preempted
from cpt_jax.core.progress import say
from cpt_jax.core.tree import Tree
from cpt_jax.recipe.recipe import Recipe, Stage
from cpt_jax.recipe.run import Pipeline
from cpt_jax.recipe.shared import SharedStations
from cpt_jax.recipe.stations import Begun, Workdir
from cpt_jax.training.loop import train
from cpt_jax.training.memory import device_memory, is_out_of_memory
from cpt_jax.training.stacked import joint_settings
from cpt_jax.training.together import train_together
from cpt_jax.training.trackers import TrackerName, Tracking
from cpt_jax.training.training import Training

# Of a device's memory, for what is counted on paper: compilers take more.
USABLE = 0.6
# What does not tell two recipes' programs apart.
_OF_RECIPE = ("name", "seed", "samples", "export")
_OF_STAGE = ("mixture", "schedule", "checkpoint_seconds", "keep")


def together_key(recipe: Recipe) -> str | None:
    """The same for two recipes whose stages differ in nothing but numbers that are given to a program step by step; None:
    this one goes alone."""
    # A watch, or a text's end, may end a stage early.
    if processes.count() > 1 or any(stage.watch or stage.max_epochs for stage in recipe.stages):
        return None
    document = to_json(recipe)
    for field in _OF_RECIPE:
        document.pop(field)
    for stage, whole in zip(document["stages"], recipe.stages, strict=True):
        for field in _OF_STAGE:
            stage.pop(field)
        stage["tokens"] = whole.steps
        stage["optimizer"] |= {"learning_rate": 1, "max_skipped": 1}
        for part in stage["retention"]:
            part.update({name: 1 for name in ("weight", "warmup") if "domains" in part})
    return fingerprint(document)


def groups_of(recipes: dict[str, Recipe], most: int | None) -> list[list[str]]:
    """Names of runs, those that can go together in one list, of at most so many."""
    found: dict[str, list[str]] = {}
    for name, recipe in recipes.items():
        found.setdefault(together_key(recipe) or name, []).append(name)
    return [
        names[first : first + (most or len(names))]
        for names in found.values()
        for first in range(0, len(names), most or len(names))
    ]


def run_group(
    recipes: dict[str, Recipe],
    place: Callable[[str], Path],
    *,
    shared: SharedStations,
    only: str | None,
    update: bool,
    most: int | None,
    track: Sequence[TrackerName],
    on_failure: Callable[[str, Exception], None],
    on_done: Callable[[str], None],
) -> None:
    """Brings runs from the beginning to the end: their stages together, what is before and behind them one by one.

    A run that fails is told of, and the others go on.
    """
    with contextlib.ExitStack() as claimed:
        pipelines: dict[str, Pipeline] = {}

        def attempt(name: str, work: Callable[[], Any]) -> None:
            try:
                work()
            except Preempted:
                raise
            except Exception as error:
                pipelines.pop(name, None)
                on_failure(name, error)

        def begin(name: str) -> None:
            workdir = claimed.enter_context(Workdir(place(name), recipes[name], update=update, shared=shared))
            pipelines[name] = Pipeline(recipes[name], workdir)
            pipelines[name].tracking = Tracking(kinds=tuple(track), run=name, directory=workdir.path)
            pipelines[name].until_training(only)
            if len(recipes) > 1:
                # A run's own time left says little among others.
                pipelines[name].plan = None

        for name in recipes:
            attempt(name, lambda name=name: begin(name))
        stages = max((len(recipe.stages) for recipe in recipes.values()), default=0)
        for index in range(stages):
            _stage_of_all(pipelines, index, most, attempt)
            for name, pipeline in list(pipelines.items()):
                attempt(
                    name, lambda pipeline=pipeline, index=index: _evaluated(pipeline, pipeline.recipe.stages[index])
                )
        for name, pipeline in list(pipelines.items()):
            attempt(name, lambda pipeline=pipeline: pipeline.finish(only))
            if name in pipelines:
                on_done(name)


def _evaluated(pipeline: Pipeline, stage: Stage) -> None:
    pipeline.evaluate_stage(stage)
    # Of many runs, none keeps its weights while the others are at work.
    pipeline.lineage.forget()


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """A stage of a run that is begun and not trained yet."""

    name: str
    pipeline: Pipeline
    stage: Stage
    begun: Begun
    training: Training


def _stage_of_all(
    pipelines: dict[str, Pipeline], index: int, most: int | None, attempt: Callable[[str, Callable[[], Any]], None]
) -> None:
    """Trains the stage with this number of all runs that have not done it."""
    waiting: list[_Waiting] = []

    def begin(name: str, pipeline: Pipeline) -> None:
        stage = pipeline.recipe.stages[index]
        begun = pipeline.begin_stage(index, stage)
        if not begun.done:
            waiting.append(_Waiting(name, pipeline, stage, begun, pipeline.training(index, stage)))

    for name, pipeline in list(pipelines.items()):
        attempt(name, lambda name=name, pipeline=pipeline: begin(name, pipeline))
    for part in _parts(waiting, most):
        _train_part(part, attempt)


def _parts(waiting: Sequence[_Waiting], most: int | None) -> list[list[_Waiting]]:
    """Those that one program can train, as many as there is memory for."""
    parts: list[list[_Waiting]] = []
    for each in waiting:
        for part in parts:
            trainings = [other.training for other in (*part, each)]
            if len(part) < (most or most_by_memory(each.training)) and joint_settings(trainings) is not None:
                part.append(each)
                break
        else:
            parts.append([each])
    return parts


def _trained(part: Sequence[_Waiting]) -> list[dict[str, Tree] | Exception]:
    if len(part) == 1:
        return [train(part[0].training, part[0].pipeline.plan)]
    label = f"stage-{part[0].stage.name} of {len(part)} runs"
    return train_together([each.training for each in part], [each.pipeline.makes_loader for each in part], label)


def _train_part(part: Sequence[_Waiting], attempt: Callable[[str, Callable[[], Any]], None]) -> None:
    try:
        results = _trained(part)
    except Preempted:
        raise
    except Exception as error:
        if len(part) > 1 and is_out_of_memory(error):
            error.__traceback__ = None
            say(f"{len(part)} runs together are too large for the memory: half as many go together")
            middle = len(part) // 2
            _train_part(part[:middle], attempt)
            _train_part(part[middle:], attempt)
            return
        results = [error] * len(part)

    def end(each: _Waiting, result: Any) -> None:
        if isinstance(result, Exception):
            raise result
        each.pipeline.end_stage(each.stage, each.begun, result)

    for each, result in zip(part, results, strict=True):
        attempt(each.name, lambda each=each, result=result: end(each, result))


def most_by_memory(training: Training) -> int:
    """How many runs like this one there is memory for, on paper."""
    memory = training.memory()
    # While states are stacked, each is there twice.
    one = memory.held + max(memory.held, memory.temporary)
    return max(1, int(USABLE * device_memory() / one))
