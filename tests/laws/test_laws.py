"""Laws against published figures and against data whose law is known."""

import numpy as np
import pytest

from cpt_jax.core.errors import UserError
from cpt_jax.laws.answer import Budget, answer, fit_both
from cpt_jax.laws.critical import fit_power
from cpt_jax.laws.fit import fit_law
from cpt_jax.laws.points import Point

# Ibrahim et al. 2024 (arXiv 2403.08763), 405M, Pile to German: share of replay, loss on the Pile, loss on German.
GERMAN = [
    (0, 3.56, 1.11),
    (0.01, 2.83, 1.12),
    (0.05, 2.57, 1.12),
    (0.1, 2.46, 1.13),
    (0.25, 2.33, 1.16),
    (0.5, 2.24, 1.22),
]
# Que et al. 2024 (arXiv 2406.01375), chemistry, Qwen1.5-1.8B, 10B tokens: share of general text, its loss, the domain's.
CHEMISTRY = [(0.1, 2.9052, 1.7321), (0.09, 2.9193, 1.7312), (0.08, 2.9376, 1.7311), (0.076, 2.9445, 1.7291),
             (0.07, 2.9644, 1.7279), (0.06, 2.9848, 1.7265), (0, 3.4667, 1.7220)]  # fmt: skip


def points(rows, base: float, tokens: float = 1e9) -> list[Point]:
    runs = [Point(losses={"old": old, "new": new}, tokens=tokens, share=share) for share, old, new in rows]
    return [*runs, Point(losses={"old": base}, tokens=0, share=0)]


def test_published_losses_follow_the_law():
    law = fit_law(points(GERMAN, 2.17), "old", is_new=False, draws=0)
    said = law.predict(np.array([share for share, _, _ in GERMAN]), 1e9, None)
    np.testing.assert_allclose(said, [old for _, old, _ in GERMAN], rtol=4e-3)


def test_the_published_share_of_replay_is_found():
    given = points(CHEMISTRY, 2.8602, 10e9)
    found = answer(given, fit_both(given, "old", "new"), Budget.parse("3%"))
    assert found.replay.best == pytest.approx(1 - 0.924, abs=1e-3)
    assert "replay 7.5 to 7.7%" in found.sentence


def test_the_course_of_published_critical_ratios_is_foretold():
    for (alpha, s, beta), published in (
        ((0.22524761, 0.26944345, -0.48139982), 0.298),
        ((-2.36384831, -0.15125569, 1.59223649), 0.414),
    ):
        tokens = np.array([30, 40, 50, 60, 70.0])
        fitted = fit_power(tokens / 50, (alpha * tokens**s + beta)[None])[0]
        assert fitted[0] * 2 ** fitted[1] + fitted[2] == pytest.approx(published, abs=2e-3)


def test_a_run_that_went_astray_does_not_move_the_law():
    shares = np.array([0, 0.01, 0.03, 0.05, 0.1, 0.2, 0.35, 0.5])
    truth = 0.9 + 0.35 * (shares + 0.01) ** -0.25
    losses = truth.copy()
    losses[4] *= 1.1
    law = fit_law(
        [Point(losses={"old": y}, tokens=1e8, share=r) for r, y in zip(shares, losses, strict=True)],
        "old",
        is_new=False,
        draws=0,
    )
    np.testing.assert_allclose(law.predict(shares, 1e8, None), truth, rtol=5e-3)


def test_too_few_shares_say_how_many_more():
    with pytest.raises(UserError, match=r"are 3: run 1 more share$"):
        fit_law(points(GERMAN[:3], 2.17), "old", is_new=False)


def test_nothing_is_answered_beyond_what_was_run():
    given = points(GERMAN, 2.17)
    found = answer(given, fit_both(given, "old", "new", draws=50), Budget.parse("1%"))
    assert found.replay.best == float("inf")
    assert "no share of replay that was run is enough" in found.sentence
