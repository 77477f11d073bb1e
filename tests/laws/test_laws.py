"""Laws against published figures and against data whose law is known."""

import numpy as np
import pytest

from cpt_jax.core.errors import UserError
from cpt_jax.laws.answer import Budget, answer, fit_both, percent
from cpt_jax.laws.critical import critical_law, fit_power
from cpt_jax.laws.fit import fit_law
from cpt_jax.laws.points import Point
from experiments.published_figures import CHEMISTRY, CHEMISTRY_SHARE, CRITICAL_RATIOS, CRITICAL_SHARES, GERMAN
from experiments.synthetic_laws import Truth, runs


def test_published_losses_follow_the_law():
    law = fit_law(GERMAN.points, "old", is_new=False, draws=0)
    said = law.predict(np.array([share for share, _, _ in GERMAN.rows]), GERMAN.tokens, None)
    np.testing.assert_allclose(said, [old for _, old, _ in GERMAN.rows], rtol=4e-3)


def test_the_published_share_of_replay_is_found():
    found = answer(CHEMISTRY.points, fit_both(CHEMISTRY.points, "old", "new"), Budget.parse("3%"))
    assert found.replay.best == pytest.approx(1 - CHEMISTRY_SHARE, abs=1e-3)
    assert "replay 7.5 to 7.7%" in found.sentence


@pytest.mark.parametrize("published", CRITICAL_RATIOS, ids=lambda each: each.model)
def test_the_course_of_published_critical_ratios_is_foretold(published):
    tokens = np.array([6e9, 8e9, 10e9, 12e9, 14e9])
    alpha, s, beta = fit_power(tokens / 1e10, published.ratio(tokens)[None])[0]
    assert alpha * 2**s + beta == pytest.approx(published.at_20b, abs=2e-3)


@pytest.mark.parametrize("published", CRITICAL_RATIOS, ids=lambda each: each.model)
def test_a_published_loss_at_a_smaller_share_is_foretold(published):
    runs = [
        Point(losses={"new": loss}, tokens=20e9, share=1 - own)
        for own, loss in zip(CRITICAL_SHARES, published.losses, strict=True)
    ]
    said = fit_law(runs, "new", is_new=True, draws=0).predict(np.array([0.75]), 20e9, None)[0]
    assert said == pytest.approx(published.measured, rel=5e-3)


@pytest.mark.parametrize("b", [0.3, -0.3], ids=["tokens that teach", "forgetting that goes on"])
def test_terms_of_size_and_tokens_are_found_again(b):
    truth = Truth(E=1.2, C=0.25, gamma=0.4, epsilon=0.01, A=0.5, alpha=0.4, B=b, eta=0.6, beta=0.3)
    sizes, tokens, shares = (1e8, 3e8, 1e9), (1e9, 3e9, 1e10, 3e10), (0, 0.01, 0.05, 0.1, 0.25, 0.5)
    given = runs(truth, shares, sizes=sizes, tokens=tokens, random=np.random.default_rng(0))
    law = fit_law(given, "old", is_new=False, draws=0)
    found = law.in_units
    for name in ("E", "alpha", "eta", "beta", "C", "gamma", "epsilon"):
        assert found[name] == pytest.approx(getattr(truth, name), rel=1e-2), name
    assert found["A"] * 3e8 ** -found["alpha"] == pytest.approx(truth.A, rel=1e-2)
    assert found["B"] * 5e9 ** -found["beta"] == pytest.approx(b, rel=1e-2)
    beyond = np.array([0, 0.02, 0.3])
    np.testing.assert_allclose(law.predict(beyond, 1e11, 3e9), truth.loss(beyond, 1e11, 3e9), rtol=1e-3)


def ratio_runs(token_numbers) -> list[Point]:
    """Runs whose critical ratio for 3% is known: new text may take 1 - 0.04 (T/1e9)^0.3 of them."""
    level, c, gamma, epsilon = 0.9, 0.3, 0.5, 0.01
    limit = level + c * (0.1 + epsilon) ** -gamma
    given = [Point(losses={"old": limit / 1.03, "new": 3.0}, tokens=0, share=0)]
    for tokens in token_numbers:
        needed = 0.04 * (tokens / 1e9) ** 0.3
        for share in (0, 0.02, 0.05, 0.1, 0.25):
            old = level + (limit - level) * ((share + epsilon) / (needed + epsilon)) ** -gamma
            given.append(Point(losses={"old": old, "new": 1.2 + 0.1 * (1 - share) ** -0.5}, tokens=tokens, share=share))
    return given


def test_the_critical_ratio_is_found_and_foretold():
    found = critical_law(ratio_runs((1e9, 2e9, 4e9, 8e9)), "old", "new", Budget.parse("3%"), draws=50)
    for tokens, ratio in found.ratios.items():
        assert ratio.best == pytest.approx(1 - 0.04 * (tokens / 1e9) ** 0.3, abs=1e-3)
        assert ratio.low <= ratio.best <= ratio.high
    ahead = found.predict(32e9)
    assert ahead.best == pytest.approx(1 - 0.04 * 32**0.3, abs=3e-3)
    assert ahead.low <= ahead.best <= ahead.high


def test_the_critical_ratio_needs_four_numbers_of_tokens():
    with pytest.raises(UserError, match="there are 3: run 1 more"):
        critical_law(ratio_runs((1e9, 2e9, 4e9)), "old", "new", Budget.parse("3%"), draws=20)


def test_a_longer_run_at_one_share_does_not_take_the_critical_ratio_away():
    given = ratio_runs((1e9, 2e9, 4e9, 8e9))
    longer = Point(losses={"old": 1.3, "new": 1.2}, tokens=16e9, share=0.25)
    budget = Budget.parse("3%")
    found = critical_law([*given, longer], "old", "new", budget, draws=20)
    assert found.ratios == critical_law(given, "old", "new", budget, draws=20).ratios


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
        fit_law([point for point in GERMAN.points if point.share < 0.1], "old", is_new=False)


def test_what_cannot_be_meant_is_refused_and_what_cannot_be_told_is_noted():
    points = GERMAN.points
    laws, one = fit_both(points, "old", "new", draws=2), Budget.parse("1%")
    for given, told in (
        (dict(tokens=0), "tokens is 0: give a number above 0"),
        (dict(tokens=-5.0), "tokens is -5"),
        (dict(tokens=float("nan")), "tokens is nan"),
        (dict(size=0), "size is 0"),
    ):
        with pytest.raises(UserError, match=told):
            answer(points, laws, one, **given)
    with pytest.raises(
        UserError, match=r"a budget of 1 is that much loss, .*: give 1% .*, or \d+% if so much is meant"
    ):
        answer(points, laws, Budget.parse("1"))
    loss = answer(points, laws, Budget.parse("0.05"))
    assert f"0.05 more loss ({percent(0.05 / loss.base)} of the base's {loss.base:.4g})" in loss.sentence
    notes = answer(points, laws, one, size=7e9).notes
    assert "the runs do not say how many parameters they had: what 7e+09 would change, they cannot tell" in notes


def test_nothing_is_answered_beyond_what_was_run():
    found = answer(GERMAN.points, fit_both(GERMAN.points, "old", "new", draws=50), Budget.parse("1%"))
    assert found.replay.best == float("inf")
    assert "no share of replay that was run is enough" in found.sentence
