"""The domains' shares of the tokens: constant, by size, or changing over a stage."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float

from cpt_jax.core.errors import UserError

# Progress through the stage [n], from 0 to 1, to shares that sum to one [n, domains].
SharesAt = Callable[[Float[np.ndarray, "n"]], Float[np.ndarray, "n domains"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Temperature:
    """Shares in proportion to tokens ** (1 / temperature): 1 as much as there is, higher ones nearer to equal shares
    (Devlin 2018, multilingual BERT; Conneau et al. 2020, arXiv 1911.02116)."""

    domains: tuple[str, ...]
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not self.domains or len(set(self.domains)) != len(self.domains):
            raise UserError(f"Temperature.domains is {self.domains}: give each domain once, and at least one")
        if not self.temperature >= 1:
            raise UserError(f"Temperature.temperature is {self.temperature}: give 1 (as much as there is) or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ramp:
    """From one set of shares to another, along a line or half a cosine, as in replay from 50% down to 5%."""

    start: dict[str, float]
    end: dict[str, float]
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        for which, shares in (("start", self.start), ("end", self.end)):
            _check_shares(shares, f"Ramp.{which}", least=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a stage (its share of the steps) with a mixture of its own."""

    share: float
    mixture: dict[str, float] | Temperature | Ramp

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"Phase.share is {self.share}: give a share of the stage above 0, up to 1")
        if isinstance(self.mixture, Mapping):
            _check_shares(self.mixture, "Phase.mixture", least=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phases:
    """One mixture after the other: steps, or a last part that anneals on the best text."""

    parts: tuple[Phase, ...]

    def __post_init__(self) -> None:
        if abs((covered := sum(part.share for part in self.parts)) - 1) > 1e-6:
            raise UserError(
                f"mixture: the phases cover {covered:g} of the stage: give shares that sum to 1 "
                f"({', '.join(f'{part.share:g}' for part in self.parts)})"
            )


Mixture: TypeAlias = dict[str, float] | Temperature | Ramp | Phases


def check_mixture(mixture: Mixture) -> None:
    """Raises UserError unless constant shares are positive and sum to one; the others are checked where they are
    made."""
    if isinstance(mixture, Mapping):
        _check_shares(mixture, "mixture", least=None)


def _check_shares(shares: Mapping[str, float], what: str, least: float | None) -> None:
    for name, share in shares.items():
        if least is None and not share > 0:
            raise UserError(f"{what}: the share of {name!r} is {share}: give a number above 0, or leave it out")
        if least is not None and not share >= least:
            raise UserError(f"{what}: the share of {name!r} is {share}: give {least:g} or more")
    if abs((total := sum(shares.values())) - 1) > 1e-6:
        raise UserError(
            f"{what}: the shares sum to {total:g}, not to 1 ({', '.join(f'{k} {v:g}' for k, v in shares.items())})"
        )


def domains_of(mixture: Mixture) -> tuple[str, ...]:
    """The domains that are mixed at some time, in the order they are named in."""
    match mixture:
        case Temperature():
            return mixture.domains
        case Ramp():
            names = [*mixture.start, *mixture.end]
        case Phases():
            names = [name for part in mixture.parts for name in domains_of(part.mixture)]
        case _:
            names = list(mixture)
    return tuple(dict.fromkeys(names))


def changes(mixture: Mixture) -> bool:
    """Whether the shares change over a stage, whose length has to be known then."""
    return isinstance(mixture, Ramp | Phases)


def shares_of(mixture: Mixture, names: Sequence[str], tokens: Mapping[str, int]) -> SharesAt:
    """The shares of the domains `names` against progress.

    Args:
      tokens: what each domain has.
    """
    match mixture:
        case Temperature():
            sizes = {name: max(tokens[name], 1) ** (1 / mixture.temperature) for name in mixture.domains}
            return shares_of({name: size / sum(sizes.values()) for name, size in sizes.items()}, names, tokens)
        case Ramp():
            start, end = (np.array([each.get(name, 0.0) for name in names]) for each in (mixture.start, mixture.end))
            bent = (lambda p: 0.5 - 0.5 * np.cos(np.pi * p)) if mixture.shape == "cosine" else (lambda p: p)
            return lambda progress: start + np.outer(bent(np.clip(progress, 0, 1)), end - start)
        case Phases():
            return _phases(mixture.parts, names, tokens)
        case _:
            row = np.array([mixture.get(name, 0.0) for name in names])
            return lambda progress: np.tile(row, (len(progress), 1))


def _phases(parts: Sequence[Phase], names: Sequence[str], tokens: Mapping[str, int]) -> SharesAt:
    ends = np.cumsum([part.share for part in parts])
    within = [shares_of(part.mixture, names, tokens) for part in parts]

    def shares(progress: np.ndarray) -> np.ndarray:
        # Sums of shares round: the last row of a phase is not to be the next one's.
        which = np.minimum(np.searchsorted(ends, progress + 1e-9, side="right"), len(parts) - 1)
        found = np.zeros((len(progress), len(names)))
        for number, part in enumerate(parts):
            at = which == number
            found[at] = within[number]((progress[at] - (ends[number] - part.share)) / part.share)
        return found

    return shares


def mean_shares(mixture: Mixture, tokens: Mapping[str, int]) -> dict[str, float]:
    """Each domain's share of a whole stage."""
    names = domains_of(mixture)
    middles = (np.arange(1000) + 0.5) / 1000
    return dict(zip(names, shares_of(mixture, names, tokens)(middles).mean(0).tolist(), strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Raised:
    """More of some domains than the mixture gives: their shares times a factor, together at most `maximum`."""

    domains: tuple[str, ...]
    factor: float
    maximum: float

    def over(self, shares: SharesAt, names: Sequence[str]) -> SharesAt:
        """The shares with these raised and the others lowered in proportion."""
        raised = np.isin(names, self.domains)

        def changed(progress: np.ndarray) -> np.ndarray:
            given = shares(progress)
            before = given[:, raised].sum(1, keepdims=True)
            after = np.maximum(before, np.minimum(before * self.factor, self.maximum))
            # A domain that has all, or none, keeps it.
            fixed = (before <= 0) | (before >= 1)
            up = np.where(fixed, 1.0, after / np.where(fixed, 1.0, before))
            down = np.where(fixed, 1.0, (1 - after) / np.where(fixed, 1.0, 1 - before))
            return np.where(raised, given * up, given * down)

        return changed


def described(mixture: Mixture) -> str:
    """A mixture in a few words: "zh 75% en 25%"."""

    def words(shares: Mapping[str, float]) -> str:
        return " ".join(f"{name} {share:.3g}%" for name, share in ((n, 100 * s) for n, s in shares.items()))

    match mixture:
        case Temperature():
            return f"{' '.join(mixture.domains)} by size, temperature {mixture.temperature:g}"
        case Ramp():
            return f"{words(mixture.start)} to {words(mixture.end)} ({mixture.shape})"
        case Phases():
            return "; then ".join(f"{part.share:.3g} of it: {described(part.mixture)}" for part in mixture.parts)
        case _:
            return words(mixture)
