"""The D-CPT law (Que et al. 2024, arXiv 2406.01375): the loss on a domain after continued pre-training,

    L(N, D, r) = E + A / N^alpha + B r^eta / D^beta + C / (r + epsilon)^gamma

for a model of N parameters, D tokens, and the domain's own share r of them; and the parts of it that data can tell.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from cpt_jax.core.errors import UserError
from cpt_jax.laws.points import lengths

PARAMETERS = ("E", "A", "alpha", "B", "eta", "beta", "C", "gamma", "epsilon")
# B may be negative: a loss that grows with the tokens is forgetting that goes on. The others are positive.
SIGNED = "B"
# The box that is searched. Factors are in units of the mean loss; N and D are taken relative to their geometric mean.
BOUNDS = {
    "E": (1e-6, 3.0),
    "A": (1e-6, 30.0),
    "alpha": (0.02, 3.0),
    "B": (-10.0, 10.0),
    "eta": (0.05, 5.0),
    "beta": (0.02, 3.0),
    "C": (1e-6, 30.0),
    "gamma": (0.02, 5.0),
    "epsilon": (1e-6, 1.0),
}
# Where the data cannot tell an exponent: those of Hoffmann et al. 2022 (arXiv 2203.15556), tokens that help by share, and
# the epsilon that most fits of ours lie around. Intervals are made with values from the ranges below.
USUAL = {"alpha": 0.34, "beta": 0.28, "eta": 1.0, "epsilon": 0.01}
USUAL_RANGES = {"alpha": (0.2, 0.58), "beta": (0.15, 0.52), "eta": (0.3, 3.3), "epsilon": (5e-4, 0.2)}
SHARES_NEEDED = 4

Values = Float[np.ndarray, "points"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Where a domain was measured: model size relative to `size_unit`, tokens relative to `token_unit`, and the domain's
    own share of the tokens, a value a point; and the share that was asked for, which tells shares apart."""

    size: Values
    tokens: Values
    share: Values
    asked: Values

    def __len__(self) -> int:
        return len(self.share)

    def of(self, chosen: np.ndarray) -> "Settings":
        """Those of a mask or of indices."""
        return Settings(
            size=self.size[chosen], tokens=self.tokens[chosen], share=self.share[chosen], asked=self.asked[chosen]
        )

    @property
    def distinct(self) -> int:
        return len(set(zip(self.size.tolist(), lengths(self.tokens.tolist()), self.asked.tolist(), strict=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """The law with some parameters free and the others fixed (all fits alike, or a value a fit); a factor fixed at 0
    drops its term."""

    free: tuple[str, ...]
    fixed: Mapping[str, float | Float[np.ndarray, "fits"]]

    @property
    def places(self) -> list[int]:
        """Indices of the free parameters in `PARAMETERS`."""
        return [PARAMETERS.index(name) for name in self.free]

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest coordinates of the free parameters: logarithms, and B itself."""
        low, high = np.array([BOUNDS[name] for name in self.free]).T
        signed = np.array([name == SIGNED for name in self.free])
        return (
            np.where(signed, low, np.log(np.where(signed, 1.0, low))),
            np.where(signed, high, np.log(np.where(signed, 1.0, high))),
        )

    def parameters(self, coordinates: Float[np.ndarray, "fits free"]) -> Float[np.ndarray, "fits parameters"]:
        """All parameters, in the order of `PARAMETERS`, from the free ones' coordinates."""
        whole = np.empty((len(coordinates), len(PARAMETERS)))
        for index, name in enumerate(PARAMETERS):
            if name in self.free:
                column = coordinates[:, self.free.index(name)]
                whole[:, index] = column if name == SIGNED else np.exp(column)
            else:
                whole[:, index] = self.fixed[name]
        return whole

    def with_usual_ranges(self, count: int, random: np.random.Generator) -> "Form":
        """For `count` fits: what is fixed for want of runs takes values of its usual range instead."""
        drawn = {}
        for name in USUAL:
            if name not in self.free:
                low, high = np.log(USUAL_RANGES[name])
                drawn[name] = np.exp(random.uniform(low, high, count))
        return dataclasses.replace(self, fixed={**self.fixed, **drawn})

    @property
    def told(self) -> list[str]:
        """What was fixed or dropped, in words."""
        lines = [
            f"{term} dropped: the runs have one {what}"
            for factor, term, what in (("A", "A/N^alpha", "model size"), ("B", "B r^eta/D^beta", "number of tokens"))
            if factor not in self.free
        ]
        kept = {"alpha": "A", "beta": "B", "eta": "B", "epsilon": "C"}
        lines += [
            f"{name} taken to be {USUAL[name]:g} (in the interval: {USUAL_RANGES[name][0]:g} to {USUAL_RANGES[name][1]:g}): the runs are too few to tell it"
            for name, factor in kept.items()
            if factor in self.free and name not in self.free
        ]
        return lines


def predict(parameters: Float[np.ndarray, "fits parameters"], at: Settings) -> Float[np.ndarray, "fits points"]:
    """The law's losses for each set of parameters, in units of the mean loss."""
    terms = _terms(parameters, at)
    return sum(terms[1:], terms[0])


def _terms(parameters: np.ndarray, at: Settings) -> list[np.ndarray]:
    e, a, alpha, b, eta, beta, c, gamma, epsilon = (column[:, None] for column in parameters.T)
    return [
        np.broadcast_to(e, (len(parameters), len(at))),
        a * at.size[None] ** -alpha,
        b * at.share[None] ** eta * at.tokens[None] ** -beta,
        c * (at.share[None] + epsilon) ** -gamma,
    ]


def slopes(parameters: np.ndarray, at: Settings) -> Float[np.ndarray, "fits points parameters"]:
    """Derivatives of `predict` by the coordinates of all parameters."""
    e, a, b, c = _terms(parameters, at)
    _, _, alpha, _, eta, beta, _, gamma, epsilon = (column[:, None] for column in parameters.T)
    log_share = np.log(np.where(at.share > 0, at.share, 1.0))[None]
    without_factor = at.share[None] ** eta * at.tokens[None] ** -beta
    shifted = at.share[None] + epsilon
    columns = [
        e,
        a,
        -alpha * np.log(at.size)[None] * a,
        without_factor,
        eta * log_share * b,
        -beta * np.log(at.tokens)[None] * b,
        c,
        -gamma * np.log(shifted) * c,
        -gamma * epsilon / shifted * c,
    ]
    return np.stack(columns, axis=-1)


def form_for(at: Settings, domain: str) -> Form:
    """The richest form that the settings can tell, with at least one run more than free parameters.

    Raises:
      UserError: too few runs; it says how many are needed, and which.
    """
    counted = (at.size.tolist(), lengths(at.tokens.tolist()), at.asked.tolist())
    sizes, tokens, shares = (len(set(values)) for values in counted)
    if shares < SHARES_NEEDED:
        missing = SHARES_NEEDED - shares
        raise UserError(
            f"the law of {domain!r} needs runs with at least {SHARES_NEEDED} shares of replay, and there "
            f"{'is' if shares == 1 else 'are'} {shares}: run {missing} more share{'s' * (missing > 1)}"
        )
    fixed = {"A": 0.0, "B": 0.0, **USUAL}
    steps: list[tuple[str, ...]] = [("E", "C", "gamma")]
    if sizes > 1:
        steps.append(("A",))
    if tokens > 1:
        steps.append(("B",))
    steps.append(("epsilon",))
    steps += [("alpha",)] if sizes > 2 else []
    steps += [("beta",)] if tokens > 2 else []
    steps += [("eta",)] if tokens > 2 else []
    free: tuple[str, ...] = ()
    needed = 1 + sum(len(step) for step in steps if step[0] in ("E", "A", "B"))
    if len(at) < needed or at.distinct < needed - 1:
        varied = [
            name
            for name, count in (("share of replay", shares), ("tokens", tokens), ("model size", sizes))
            if count > 1
        ]
        raise UserError(
            f"the law of {domain!r} has {needed - 1} parameters and needs {needed} runs that differ in {', '.join(varied)}; "
            f"there are {at.distinct}: run {max(1, needed - at.distinct)} more"
        )
    for step in steps:
        together = len(free) + len(step)
        if at.distinct >= together and len(at) > together:
            free += step
    return Form(free=tuple(name for name in PARAMETERS if name in free), fixed=fixed)


def settings_of(
    sizes: Sequence[float | None], tokens: Sequence[float], shares: Sequence[float], asked: Sequence[float]
) -> tuple[Settings, float, float]:
    """Settings relative to the geometric means of sizes and tokens, and these two units. Sizes that are not all known
    count as one."""
    known = [size for size in sizes if size is not None]
    own = np.asarray(known if len(known) == len(sizes) else [1.0] * len(sizes), float)
    seen = np.asarray(tokens, float)
    size_unit, token_unit = (float(np.exp(np.log(values).mean())) for values in (own, seen))
    return (
        Settings(
            size=own / size_unit,
            tokens=seen / token_unit,
            share=np.asarray(shares, float),
            asked=np.asarray(asked, float),
        ),
        size_unit,
        token_unit,
    )
