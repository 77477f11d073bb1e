"""Runs whose law is known: whether a fit finds it again, and how often its intervals of 90% hold it."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cpt_jax.laws.answer import HIGH, LOW, Budget, answer
from cpt_jax.laws.fit import Law, fit_law
from cpt_jax.laws.form import PARAMETERS
from cpt_jax.laws.points import Point

DRAWS = 200
TOLERANCE = Budget.parse("3%")
SIZES, TOKENS = (1e8, 3e8, 1e9), (1e9, 3e9, 1e10, 3e10)
SIZE_UNIT, TOKEN_UNIT = 3e8, 5e9
SIX, EIGHT = (0, 0.01, 0.05, 0.1, 0.25, 0.5), (0, 0.01, 0.03, 0.05, 0.1, 0.2, 0.35, 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Truth:
    """A law, with A and B at 3e8 parameters and 5e9 tokens."""

    E: float
    C: float
    gamma: float
    epsilon: float
    A: float = 0.0
    alpha: float = 0.34
    B: float = 0.0
    eta: float = 1.0
    beta: float = 0.28

    def loss(self, share, tokens: float = TOKEN_UNIT, size: float = SIZE_UNIT):
        """Written down once more: nothing of `laws/` is in it."""
        of_size = self.A * (size / SIZE_UNIT) ** -self.alpha
        of_tokens = self.B * share**self.eta * (tokens / TOKEN_UNIT) ** -self.beta
        return self.E + of_size + of_tokens + self.C * (share + self.epsilon) ** -self.gamma


def drawn(random: np.random.Generator, *, sizes_and_tokens: bool) -> Truth:
    """A law at random: between half and no replay lie 10 to 50% of the loss at half. With sizes and tokens, B helps in one
    of two laws (tokens that teach), and hurts in the other (forgetting that goes on)."""
    gamma, epsilon = np.exp(random.uniform(np.log([0.1, 0.002]), np.log([1.0, 0.05])))
    rise = random.uniform(0.1, 0.5)
    c = rise / (epsilon**-gamma - (0.5 + epsilon) ** -gamma)
    level = 1 - c * (0.5 + epsilon) ** -gamma
    if not sizes_and_tokens:
        return Truth(E=level, C=c, gamma=gamma, epsilon=epsilon)
    alpha, beta, eta = random.uniform([0.2, 0.2, 0.3], [0.6, 0.5, 1.5])
    sign = random.choice([-1.0, 1.0])
    return Truth(E=level + 0.5, C=c, gamma=gamma, epsilon=epsilon, A=0.4, alpha=alpha, B=0.3 * sign, eta=eta, beta=beta)


def runs(
    truth: Truth,
    shares: Sequence[float],
    *,
    seeds: int = 1,
    noise: float = 0.0,
    astray: float = 0.0,
    tokens: Sequence[float] = (TOKEN_UNIT,),
    sizes: Sequence[float | None] = (None,),
    random: np.random.Generator,
) -> list[Point]:
    """Points of the law, each off by Gaussian `noise` (relative), and a share `astray` of them 10% too high besides."""

    def measured(share: float, number: float, size: float | None) -> float:
        off = random.normal(0, noise) + 0.1 * (random.random() < astray)
        return float(truth.loss(share, number, size or SIZE_UNIT) * np.exp(off))

    return [
        Point(losses={"old": measured(share, number, size)}, tokens=number, share=share, size=size, seed=seed)
        for size in sizes
        for number in tokens
        for share in shares
        for seed in range(seeds)
    ]


def covered(shares: Sequence[float], *, seeds: int, noise: float, astray: float, sets: int) -> dict:
    """How often intervals of 90% hold the truth, over laws at random: the share of replay that is asked for (2 to 30%, as
    `cpt law` answers it), and the losses at shares between those that were run."""
    random, of_share, of_loss, widths = np.random.default_rng(0), [], [], []
    between = np.array([0.02, 0.07, 0.15, 0.3])
    for _ in range(sets):
        truth = drawn(random, sizes_and_tokens=False)
        asked = float(np.exp(random.uniform(np.log(0.02), np.log(0.3))))
        points = runs(truth, shares, seeds=seeds, noise=noise, astray=astray, random=random)
        base = truth.loss(asked) / (1 + TOLERANCE.amount)
        law = fit_law(points, "old", is_new=False, draws=DRAWS)
        # The new domain's law tells the cost alone.
        found = answer([*points, Point(losses={"old": base}, tokens=0, share=0)], (law, law), TOLERANCE).replay
        of_share.append(found.low <= asked <= found.high)
        if np.isfinite(found.high) and found.low > 0:
            widths.append(found.high / found.low)
        low, high = np.quantile(law.predict_draws(between, TOKEN_UNIT, None), [LOW, HIGH], axis=0)
        of_loss.append(np.mean((low <= truth.loss(between)) & (truth.loss(between) <= high)))
    return {
        "shares": list(shares),
        "seeds": seeds,
        "noise": noise,
        "astray": astray,
        "sets": sets,
        "share_covered": float(np.mean(of_share)),
        "loss_covered": float(np.mean(of_loss)),
        "median_high_over_low": float(np.median(widths)),
    }


def recovered(sizes: Sequence[float], tokens: Sequence[float], *, noise: float, sets: int) -> dict:
    """How well the terms of size and tokens are found again, over laws at random: errors of the exponents, how often their
    intervals hold them, and both for the loss of a model twice as large with twice the tokens, at shares not run."""
    random, exponents = np.random.default_rng(1), ("alpha", "beta", "eta")
    errors, inside, ahead, ahead_inside, signs = [], [], [], [], []
    beyond, size, number = np.array([0, 0.02, 0.07, 0.15, 0.3]), 2 * max(sizes), 2 * max(tokens)
    for _ in range(sets):
        truth = drawn(random, sizes_and_tokens=True)
        points = runs(truth, SIX, noise=noise, tokens=tokens, sizes=sizes, random=random)
        law = fit_law(points, "old", is_new=False, draws=DRAWS if noise else 0)
        asked, real = np.array([getattr(truth, name) for name in exponents]), truth.loss(beyond, number, size)
        places = [PARAMETERS.index(name) for name in exponents]
        errors.append(np.abs(law.parameters[places] / asked - 1))
        ahead.append(np.abs(law.predict(beyond, number, size) / real - 1))
        signs.append(np.sign(law.in_units["B"]) == np.sign(truth.B))
        if noise:
            inside.append(_holds(law.draws[:, places], asked))
            ahead_inside.append(_holds(law.predict_draws(beyond, number, size), real).mean())
    result = {
        "sizes": list(sizes),
        "tokens": list(tokens),
        "runs": len(sizes) * len(tokens) * len(SIX),
        "noise": noise,
        "sets": sets,
        "median_errors": dict(zip(exponents, np.median(errors, axis=0).tolist(), strict=True)),
        "largest_errors": dict(zip(exponents, np.max(errors, axis=0).tolist(), strict=True)),
        "sign_of_B_found": float(np.mean(signs)),
        "loss_beyond_median_error": float(np.median(ahead)),
        "loss_beyond_95th_error": float(np.quantile(ahead, 0.95)),
    }
    if noise:
        result["exponents_covered"] = dict(zip(exponents, np.mean(inside, axis=0).tolist(), strict=True))
        result["loss_beyond_covered"] = float(np.mean(ahead_inside))
    return result


def _holds(draws: np.ndarray, real: np.ndarray) -> np.ndarray:
    low, high = np.quantile(draws, [LOW, HIGH], axis=0)
    return (low <= real) & (real <= high)


def shown() -> tuple[Truth, Law]:
    """One law whose forgetting goes on with the tokens, and its fit on 72 runs with 0.3% of noise: to look at."""
    truth = Truth(E=1.2, C=0.25, gamma=0.25, epsilon=0.01, A=0.5, B=-0.3, eta=0.5)
    points = runs(truth, SIX, noise=0.003, tokens=TOKENS, sizes=SIZES, random=np.random.default_rng(0))
    return truth, fit_law(points, "old", is_new=False, draws=DRAWS)
