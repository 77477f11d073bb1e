"""The forgetting watch: bits per byte of old domains while a stage trains, and a budget that acts on them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import jax
from jax.sharding import Mesh

from cpt_jax.core import processes
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.progress import say
from cpt_jax.core.storage import disk_full_is_told, json_line, numbers, read_objects, write_text_atomic
from cpt_jax.core.tree import Tree, combine
from cpt_jax.data.loader import Loader
from cpt_jax.data.mixture import Raised
from cpt_jax.evaluate.bits_per_byte import PackedDocuments, bits_per_byte
from cpt_jax.models.decoder import Network
from cpt_jax.optim.averaging import EMA
from cpt_jax.training.state import TrainState

WATCHED = "watch.jsonl"
# How the action of a line of it begins, where shares of the mixture were raised.
RAISED = "raise replay"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stop:
    """Ends the stage when an old domain is worse than the base by more than `limit`, a share of its bits per byte."""

    limit: float = 0.02

    def __post_init__(self) -> None:
        _check_limit(self.limit)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaiseReplay:
    """When an old domain is worse than the base by more than `limit`, multiplies the replayed domains' share of the
    mixture by `factor`, each time that it is measured, up to `maximum`."""

    limit: float = 0.02
    factor: float = 1.5
    maximum: float = 0.5

    def __post_init__(self) -> None:
        _check_limit(self.limit)
        if not self.factor > 1:
            raise UserError(f"RaiseReplay.factor is {self.factor}: give more than 1")
        if not 0 < self.maximum < 1:
            raise UserError(f"RaiseReplay.maximum is {self.maximum}: give a share between 0 and 1")


Budget: TypeAlias = Stop | RaiseReplay


def _check_limit(limit: float) -> None:
    if not limit >= 0:
        raise UserError(f"the forgetting budget's limit is {limit}: give 0 or more (0.02: 2% worse than the base)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """What is measured every so many steps: `domains` (by default all that are replayed or watched), on some
    `max_bytes` of each one's held-out documents. Without a budget it changes nothing."""

    every: int
    domains: tuple[str, ...] = ()
    max_bytes: int = 20_000
    budget: Budget | None = None

    def __post_init__(self) -> None:
        for field in ("every", "max_bytes"):
            if getattr(self, field) < 1:
                raise UserError(f"Watch.{field} is {getattr(self, field)}: give at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watching:
    """A watch with all that it needs, built.

    Args:
      network: as it is compiled for reading: the layout of the stage's weights, without its kernel of attention and its limit
        of documents a row, which are of the stage's rows.
      base: bits per byte of the base, by domain.
      old: the domains that the budget is about; replayed: those of which there may be more.
      average: the EMA whose weights are exported, and measured too.
    """

    watch: Watch
    network: Network
    documents: Mapping[str, PackedDocuments]
    base: Mapping[str, float]
    old: tuple[str, ...]
    replayed: tuple[str, ...]
    batch_size: int
    precision: Precision
    average: EMA | None = None


class Watcher:
    """Measures, writes `watch.jsonl` (an object a measurement; those after `first` steps, which are computed again,
    are dropped; null for what is no number), and acts. Every process measures; the first one writes."""

    def __init__(self, watching: Watching | None, mesh: Mesh, directory: Path, first: int) -> None:
        self._watching, self._mesh, self._path = watching, mesh, directory / WATCHED
        if watching is not None and processes.is_first():
            # A stage that begins anew measures before its first step again.
            kept = [line for line in read_watch(directory) if first and line["step"] <= first]
            write_text_atomic(self._path, "".join(map(json_line, kept)))

    def due(self, step: int, last: int) -> bool:
        """Whether the weights after a step are to be measured: before the first one, at intervals, and at the end."""
        return self._watching is not None and (step % self._watching.watch.every == 0 or step == last)

    def look(self, state: TrainState, frozen: Tree, loader: Loader, tokens: int) -> tuple[dict, str | None]:
        """(the measurement, why the stage is to end, if it is). May raise shares of the loader.

        The weights are those in training, where they lie: only what is computed from them takes memory.

        Args:
          tokens: learnt so far.
        """
        watching = self._watching
        assert watching is not None
        found = {"bits_per_byte": self._measured(combine(state.trainable, frozen))}
        if watching.average is not None and state.average is not None:
            average = state.average
            if watching.average.on_host:
                average = jax.jit(watching.average.at_hand)(average)
            found["average"] = self._measured(combine(average, frozen))
        step = int(state.step)
        # Nothing is lost before the first step; what was grown or begun is the stage's to mend.
        action, ends = self._act(found.get("average", found["bits_per_byte"]), loader) if step else (None, False)
        line = {"step": step, "tokens": tokens, **found, "action": action}
        if action is not None:
            say(f"step {step}: {action}")
        if processes.is_first():
            with disk_full_is_told(self._path), self._path.open("a") as file:
                file.write(json_line(line))
        return line, action if ends else None

    def _measured(self, weights: Tree) -> dict[str, float]:
        watching = self._watching
        assert watching is not None
        return {
            name: bits_per_byte(
                watching.network,
                weights,
                documents,
                batch_size=watching.batch_size,
                precision=watching.precision,
                mesh=self._mesh,
            ).bits_per_byte
            for name, documents in watching.documents.items()
        }

    def _act(self, measured: Mapping[str, float], loader: Loader) -> tuple[str | None, bool]:
        """(what is done, whether the stage ends); the first process's word counts."""
        watching = self._watching
        assert watching is not None
        budget = watching.watch.budget
        worse = {name: measured[name] / watching.base[name] - 1 for name in watching.old if name in measured}
        # "not <=": a loss that is no number is over it, too.
        over = {name: share for name, share in worse.items() if budget is not None and not share <= budget.limit}
        if budget is None or not (over := processes.told(over)):
            return None, False
        name = max(over, key=lambda each: over[each])
        reason = f"{name} is {over[name]:.2%} worse than the base, the limit is {budget.limit:.2%}"
        if isinstance(budget, Stop):
            return f"stop: {reason}", True
        shares = loader.shares_now()
        before = sum(shares[name] for name in watching.replayed)
        if not 0 < before < budget.maximum:
            return None, False
        raised = loader.raised()
        factor = (1.0 if raised is None else raised.factor) * budget.factor
        loader.raise_shares(Raised(domains=watching.replayed, factor=factor, maximum=budget.maximum))
        after = sum(loader.shares_now()[name] for name in watching.replayed)
        return f"{RAISED} from {before:.1%} to {after:.1%}: {reason}", False


def read_watch(directory: Path) -> list[dict]:
    """A stage's measurements in order; what is null there is NaN again."""
    return [
        {name: numbers(value) if isinstance(value, Mapping) else value for name, value in line.items()}
        for line in read_objects(directory / WATCHED)
    ]
