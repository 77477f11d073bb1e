"""The critical mixture ratio (Gu et al. 2024, arXiv 2407.17467): the largest share of new text with which the old domain's
loss grows by no more than a tolerance, and how it moves with the tokens of the run, R(T) = alpha T^s + beta."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from cpt_jax.core.errors import UserError
from cpt_jax.laws.answer import HIGH, LOW, Budget, Estimate, answer, fit_both
from cpt_jax.laws.points import Point, lengths

# alpha, s and beta, and one more to see the error.
TOKENS_NEEDED = 4
EXPONENTS = np.concatenate([-np.geomspace(3, 0.02, 120), np.geomspace(0.02, 3, 120)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticalLaw:
    """R(T) = alpha T^s + beta with T in units of `token_unit` tokens; `draws` holds (alpha, s, beta) of ratios drawn anew."""

    ratios: dict[float, Estimate]
    token_unit: float
    parameters: Float[np.ndarray, "3"]
    draws: Float[np.ndarray, "draws 3"]

    def predict(self, tokens: float) -> Estimate:
        """The critical share of new text in a run of so many tokens, between 0 and 1."""
        all_fits = np.concatenate([self.parameters[None], self.draws])
        ratios = np.clip(all_fits[:, 0] * (tokens / self.token_unit) ** all_fits[:, 1] + all_fits[:, 2], 0, 1)
        low, high = np.quantile(ratios[1:], [LOW, HIGH]) if len(self.draws) else (ratios[0], ratios[0])
        return Estimate(best=float(ratios[0]), low=float(low), high=float(high))


def fit_power(tokens: Sequence[float], ratios: Float[np.ndarray, "fits tokens"]) -> Float[np.ndarray, "fits 3"]:
    """alpha, s and beta of the least squares, each row for itself: s is tried, the rest is linear."""
    powers = np.asarray(tokens, float)[None] ** EXPONENTS[:, None]
    centred = powers - powers.mean(axis=1, keepdims=True)
    level = ratios.mean(axis=1)
    alpha = (ratios - level[:, None]) @ centred.T / (centred**2).sum(axis=1)
    beta = level[:, None] - alpha * powers.mean(axis=1)
    fitted = alpha[:, :, None] * powers[None] + beta[:, :, None]
    best = ((fitted - ratios[:, None]) ** 2).sum(axis=2).argmin(axis=1)
    rows = np.arange(len(ratios))
    return np.stack([alpha[rows, best], EXPONENTS[best], beta[rows, best]], axis=1)


def critical_law(points: Sequence[Point], old: str, new: str, budget: Budget, draws: int = 200) -> CriticalLaw:
    """The critical ratio at each number of tokens (from a law of its own), and its course.

    Raises:
      UserError: fewer than four numbers of tokens have a critical ratio inside the shares that were run.
    """
    ratios, random = {}, np.random.default_rng(0)
    of_points = lengths([point.tokens for point in points])
    for length in sorted(set(of_points) - {0}):
        of_tokens = [point for point, own in zip(points, of_points, strict=True) if own in (0, length)]
        tokens = max(point.tokens for point in of_tokens)
        try:
            laws = fit_both(of_tokens, old, new, draws)
        except UserError:
            # Too few shares were run with so many tokens: the others still have their course.
            continue
        replay = answer(of_tokens, laws, budget).replay
        if np.isfinite([replay.best, replay.low, replay.high]).all():
            ratios[tokens] = Estimate(best=1 - replay.best, low=1 - replay.high, high=1 - replay.low)
    if len(ratios) < TOKENS_NEEDED:
        raise UserError(
            f"the course of the critical ratio needs {TOKENS_NEEDED} numbers of tokens at which some share is enough, and "
            f"there are {len(ratios)}: run {TOKENS_NEEDED - len(ratios)} more, or allow more loss"
        )
    unit = float(np.exp(np.mean(np.log(list(ratios)))))
    scaled, best = [tokens / unit for tokens in ratios], np.array([each.best for each in ratios.values()])
    spread = np.array([(each.high - each.low) / 3.29 for each in ratios.values()])
    drawn = best + spread * random.normal(size=(draws, len(best)))
    return CriticalLaw(
        ratios=ratios, token_unit=unit, parameters=fit_power(scaled, best[None])[0], draws=fit_power(scaled, drawn)
    )
