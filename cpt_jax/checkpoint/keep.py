"""Which checkpoints stay."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from orbax.checkpoint import checkpoint_managers as policies

from cpt_jax.core.errors import UserError

# Of a checkpoint: the mean training loss of the steps since the one before.
METRIC = "loss"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """The newest `last`; besides them the first, and each that is at least `every` steps behind the one kept before;
    and the `best` of the lowest mean training loss since the checkpoint before (nothing is evaluated while a stage
    trains). Those that go on being better are kept; the newest are what a run continues from.

    Two of the newest are the least with which a damaged one has another before it.
    """

    last: int = 2
    every: int | None = None
    best: int | None = None

    def __post_init__(self) -> None:
        for field in ("last", "every", "best"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise UserError(f"keep: {field} is {value}: give a number of at least 1")

    def kept(self, losses: Mapping[int, float]) -> set[int]:
        """Of checkpoints with these losses by step, those that stay."""
        steps = sorted(losses)
        kept = set(steps[-self.last :])
        behind = None
        for step in steps if self.every is not None else ():
            if behind is None or step - behind >= (self.every or 0):
                kept.add(step)
                behind = step
        if self.best is not None:
            kept |= set(sorted(steps, key=lambda step: loss_of({METRIC: losses[step]}))[: self.best])
        return kept

    def should_preserve(
        self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *, context: object = None
    ) -> Sequence[bool]:
        """As orbax asks (`PreservationPolicy`)."""
        kept = self.kept({each.step: loss_of(each.metrics or {}) for each in checkpoints})
        return [each.step in kept for each in checkpoints]


def loss_of(metrics: Mapping[str, float]) -> float:
    """What checkpoints are compared by; one whose steps had a loss that is no number, or none, is never the best."""
    loss = metrics.get(METRIC, math.inf)
    return math.inf if math.isnan(loss) else loss
