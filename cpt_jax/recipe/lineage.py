"""The model as it is after each stage of a run, put together from the base and what the stages' checkpoints hold."""

from collections.abc import Sequence
from pathlib import Path

from cpt_jax.checkpoint.train_state import read_trained
from cpt_jax.core.tree import Tree, flatten
from cpt_jax.models.linear import ADAPTER_LEAVES
from cpt_jax.recipe.model import Model, load_model
from cpt_jax.recipe.recipe import Recipe, Stage


class Lineage:
    """The models of one run. The last one asked for is kept: the next station often needs it again; and what the last
    stage trained, which needs not be read from its checkpoint then.

    Args:
      source: the base as it came.
      base_rows: how many tokens its tokenizer has.
    """

    def __init__(self, recipe: Recipe, path: Path, source: Path, base_rows: int) -> None:
        self.recipe, self.path, self.source, self.base_rows = recipe, path, source, base_rows
        self._kept: tuple[str, Model] | None = None
        self._trained: dict[str, dict[str, Tree]] = {}

    def directory(self, index: int, stage: Stage) -> Path:
        """Where a stage writes."""
        return self.path / "stages" / f"{index + 1}-{stage.name}"

    def remember(self, stage: Stage, trained: dict[str, Tree]) -> None:
        """What a stage trained, as `read_trained` would read it."""
        self._trained = {stage.name: trained}

    def forget(self) -> None:
        """Gives the memory back."""
        self._kept, self._trained = None, {}

    def extended(self) -> Model:
        """The base as the stages begin with it; rows for new pieces are leaves of their own."""
        return load_model(self.path / "base", self.base_rows if self.recipe.vocabulary is not None else None)

    def after(self, stage_name: str, weights: str) -> Model:
        """The model after a stage ("base": as it came, "extended": grown, "export": as it left)."""
        key = f"{stage_name} {weights}"
        if self._kept is None or self._kept[0] != key:
            self._kept = None
            self._kept = (key, self._made(stage_name, weights))
        return self._kept[1]

    def _made(self, stage_name: str, weights: str) -> Model:
        padding = self.recipe.pad_vocabulary_to
        if stage_name == "base":
            return load_model(self.source).padded(padding)
        if stage_name == "export":
            return load_model(self.path / "export")
        if stage_name == "extended":
            return self.extended().padded(padding)
        names = [stage.name for stage in self.recipe.stages]
        index = names.index(stage_name)
        stage = self.recipe.stages[index]
        before = self.after(names[index - 1] if index else "extended", "last")
        trained = self._trained.get(stage_name) or read_trained(self.directory(index, stage) / "checkpoints")
        return before.adapted(stage.method, None).overlaid(trained[weights])

    def trained_paths(self) -> set[str]:
        """The paths at which the last stage's model (adapters attached) differs from the grown base."""
        stages = enumerate(self.recipe.stages)
        return _not_the_bases(
            [[*flatten(read_trained(self.directory(*each) / "checkpoints")["last"])] for each in stages]
        )

    def as_planned(self) -> tuple[Model, set[str]]:
        """The model after the last stage, untrained, and the paths at which it will differ from the grown base."""
        model, trained = self.extended(), []
        for stage in self.recipe.stages:
            model = model.adapted(stage.method, None)
            trained.append([path for path in flatten(model.weights) if stage.method.trains(path)])
        return model, _not_the_bases(trained)


def _not_the_bases(trained: Sequence[Sequence[str]]) -> set[str]:
    """What differs from the base after stages that trained these paths: of an earlier stage's adapters, which have been
    merged, the kernels."""
    paths: set[str] = set()
    for number, found in enumerate(trained, 1):
        factors = () if number == len(trained) else ADAPTER_LEAVES
        paths |= {f"{path.rpartition('/')[0]}/kernel" if path.endswith(factors) else path for path in found}
    return paths
