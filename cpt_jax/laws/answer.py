"""How much to replay: the smallest share with which the old domain stays within a budget, with an interval, in words."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from cpt_jax.core.errors import UserError
from cpt_jax.laws.fit import Law, fit_law
from cpt_jax.laws.points import Point, base_loss

# Of the draws, between these quantiles: 90%.
LOW, HIGH = 0.05, 0.95
# A budget in the loss's unit is some hundredths of the base's loss (Gu et al.: 0.05 nats of 2 to 3). From this share of it
# on, "1" was rather meant as 1%, and that much can still be asked for in per cent.
LARGEST_LOSS = 0.25
# Of a law: below this R² most of what the runs differ in is something else.
POOR = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How much worse than the base the old domain may be: a share of the base's loss (`relative`), or so much loss (Gu
    et al. take 0.05 nats)."""

    amount: float
    relative: bool = True

    def __post_init__(self) -> None:
        if not (self.amount >= 0 and math.isfinite(self.amount)):
            raise UserError(
                f"the budget is {self.amount}: give 0 or more, as in 1% (of the base's loss) or 0.05 (loss)"
            )

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """ "1%" of the base's loss, or "0.05" in its unit."""
        try:
            amount = float(text.removesuffix("%"))
        except ValueError:
            raise UserError(f"the budget is {text!r}: give 1% (of the base's loss), or 0.05 (loss)") from None
        return cls(amount=amount / 100, relative=True) if text.endswith("%") else cls(amount=amount, relative=False)

    def check(self, base: float) -> None:
        """Raises a UserError where it is so much loss, against the base's, that per cent must have been meant."""
        if not self.relative and self.amount >= LARGEST_LOSS * base:
            raise UserError(
                f"a budget of {self.amount:g} is that much loss, {percent(self.amount / base)} of the base's {base:.4g}: give {self.amount:g}% for a share of the base's loss, or {percent(self.amount / base)} if so much is meant"
            )

    def limit(self, base: float) -> float:
        """The highest loss that is allowed."""
        return base * (1 + self.amount) if self.relative else base + self.amount

    def words(self, base: float) -> str:
        if self.relative:
            return f"{100 * self.amount:g}% more loss"
        return f"{self.amount:g} more loss ({percent(self.amount / base)} of the base's {base:.4g})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value, and between what 90% of the draws lie. `inf` where no share that was run is enough."""

    best: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """How much to replay. `measured`: the smallest and the largest share that was run; `old_without` and `old_with`: how much
    more loss than the base's the old domain has at these two; `cost`: how much more loss the new domain has at the
    best share than at the smallest; `doubts`: the domains whose law explains little, with its R²."""

    old: str
    new: str
    budget: Budget
    base: float
    tokens: float
    size: float | None
    measured: tuple[float, float]
    replay: Estimate
    old_without: Estimate
    old_with: Estimate
    cost: Estimate
    doubts: tuple[tuple[str, float], ...]
    notes: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """The answer in words."""
        doubts = "".join(
            f" But the law tells little of what {domain} differs in from run to run (R² {r_squared:.2f}), which is chance, or goes "
            "another way than replay does: believe the runs, not the law."
            for domain, r_squared in self.doubts
        )
        return self._found + doubts

    @property
    def _found(self) -> str:
        start = f"With at most {self.budget.words(self.base)} on {self.old}, "
        low, high, best = self.replay.low, self.replay.high, self.replay.best
        smallest, largest = (percent(share) for share in self.measured)
        if high <= self.measured[0]:
            needed = (
                "no replay is needed"
                if self.measured[0] == 0
                else f"{smallest} of replay, the least that was run, is enough"
            )
            return f"{start}{needed}: at {smallest}, {self.old} changes by {_change(self.old_without)}."
        if math.isinf(low):
            return (
                f"{start}no share of replay that was run is enough: at {largest}, the most, {self.old} changes by "
                f"{_change(self.old_with)}."
            )
        if math.isinf(high) and low <= self.measured[0]:
            return f"{start}the runs do not tell how much replay: {smallest} may be enough, and {largest}, the most, may not."
        if math.isinf(high):
            more = f"; whether that is enough, the runs do not tell: none had more than {largest}"
            return f"{start}replay {percent(low)} or more{more}."
        shown = (
            f"replay {between(low, high)}" if low > self.measured[0] or low == 0 else f"replay up to {percent(high)}"
        )
        cost = (
            f", which costs {self.new} {_change(self.cost)} against {smallest} of replay" if math.isfinite(best) else ""
        )
        return f"{start}{shown}{cost}."


def percent(share: float) -> str:
    """A share as text, to two digits: 0.4%, 7.6%, 12%."""
    value = 100 * share
    digits = 0 if abs(value) >= 9.95 or value == 0 else 1 if abs(value) >= 0.995 else 2
    return f"{value:.{digits}f}%"


def between(low: float, high: float) -> str:
    """An interval of shares as text: "12 to 17%"."""
    first, last = percent(low), percent(high)
    return f"about {last}" if first == last else f"{first.removesuffix('%')} to {last}"


def _change(change: Estimate) -> str:
    return f"{100 * change.best:+.1f}% ({100 * change.low:+.1f} to {100 * change.high:+.1f}%)"


def fit_both(points: Sequence[Point], old: str, new: str, draws: int = 400) -> tuple[Law, Law]:
    """The laws of the old and of the new domain.

    Raises:
      UserError: as `fit_law`.
    """
    if old == new:
        raise UserError(f"old and new are both {old!r}: give two domains")
    return fit_law(points, old, is_new=False, draws=draws), fit_law(points, new, is_new=True, draws=draws)


def answer(
    points: Sequence[Point],
    laws: tuple[Law, Law],
    budget: Budget,
    *,
    tokens: float | None = None,
    size: float | None = None,
) -> Answer:
    """The smallest share of replay that keeps the old domain within the budget, for a run of `tokens` tokens and a model of
    `size` parameters (by default the largest that were run). Shares beyond those that were run are never answered.

    Raises:
      UserError: the base's loss is not known, or tokens, size or budget cannot be meant.
    """
    old, new = laws
    for name, value in (("tokens", tokens), ("size", size)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} is {value:g}: give a number above 0, or leave it out for the most that was run")
    tokens = tokens or max(point.tokens for point in old.points)
    sizes = [point.size for point in old.points if point.size is not None]
    size = size or (max(sizes) if sizes else None)
    base = base_loss(points, old.domain, size)
    budget.check(base)
    shares = sorted({point.share for point in old.points})
    smallest, largest = shares[0], shares[-1]
    replay = _smallest_enough(old, budget.limit(base), (smallest, largest), tokens, size)
    ends = np.array([smallest, largest])
    without, at_most = (_estimate(column / base - 1, value / base - 1) for column, value in zip(
        old.predict_draws(ends, tokens, size).T, old.predict(ends, tokens, size), strict=True
    ))  # fmt: skip
    two = np.array([smallest, replay.best if math.isfinite(replay.best) else largest])
    drawn, said = new.predict_draws(two, tokens, size), new.predict(two, tokens, size)
    return Answer(
        old=old.domain,
        new=new.domain,
        budget=budget,
        base=base,
        tokens=tokens,
        size=size,
        measured=(smallest, largest),
        replay=replay,
        old_without=without,
        old_with=at_most,
        cost=_estimate(drawn[:, 1] / drawn[:, 0] - 1, said[1] / said[0] - 1),
        doubts=tuple((law.domain, law.r_squared) for law in laws if law.r_squared < POOR),
        notes=_notes(laws, tokens, size),
    )


def _estimate(draws: np.ndarray, best: float) -> Estimate:
    low, high = np.quantile(draws, [LOW, HIGH], method="nearest") if len(draws) else (best, best)
    return Estimate(best=float(best), low=float(low), high=float(high))


def _smallest_enough(
    law: Law, limit: float, measured: tuple[float, float], tokens: float, size: float | None
) -> Estimate:
    smallest, largest = measured
    fine = np.geomspace(max(smallest, 1e-4), largest, 2000)
    grid = np.unique(np.concatenate([[smallest], fine]))
    draws = _first(law.predict_draws(grid, tokens, size) <= limit, grid)
    return _estimate(draws, float(_first(law.predict(grid, tokens, size)[None] <= limit, grid)[0]))


def _first(enough: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """For each row the first place of the grid from which on all are enough; `inf` where there is none."""
    behind = np.flip(np.logical_and.accumulate(np.flip(enough, axis=1), axis=1), axis=1)
    return np.where(behind.any(axis=1), grid[behind.argmax(axis=1)], np.inf)


def _notes(laws: tuple[Law, Law], tokens: float, size: float | None) -> tuple[str, ...]:
    notes = [f"{law.domain}: {line}" for law in laws for line in law.form.told]
    runs = laws[0].points
    for what, value, seen in (
        ("tokens", tokens, [point.tokens for point in runs]),
        ("parameters", size, [point.size for point in runs if point.size is not None]),
    ):
        if value is None or (seen and min(seen) <= value <= max(seen)):
            continue
        if not seen:
            notes.append(f"the runs do not say how many {what} they had: what {value:g} would change, they cannot tell")
        elif len(set(seen)) == 1:
            notes.append(f"the runs all had {seen[0]:g} {what}: what {value:g} would change, they cannot tell")
        else:
            notes.append(f"{value:g} {what} is outside what was run ({min(seen):g} to {max(seen):g}): an extrapolation")
    return tuple(notes)
