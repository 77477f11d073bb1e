"""The learning rate at the steps where it turns."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from cpt_jax.core.config import from_json, to_json
from cpt_jax.core.errors import UserError
from cpt_jax.optim.schedules import Constant, Cosine, Infinite, InverseSqrt, Linear, Schedule, WarmupStableDecay

PEAK = 2.0
ALL = [Constant(), Cosine(), Linear(), InverseSqrt(), WarmupStableDecay(), Infinite()]


def rates(schedule: Schedule, steps: int) -> np.ndarray:
    built = schedule.build(PEAK, steps)
    return np.array([float(built(jnp.asarray(step))) for step in range(steps)])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(warmup=0.1), {0: 0.2, 9: 2.0, 50: 2.0, 99: 2.0}),
        # 0.29 * 100 is a little less than 29.
        (Constant(warmup=0.29), {13: 2.0 * 14 / 29, 27: 2.0 * 28 / 29, 28: 2.0}),
        (Cosine(warmup=0.1, final=0.1), {0: 0.2, 9: 2.0, 10: 2.0, 99: 0.2}),
        (Cosine(warmup=0.01, final=0.0), {0: 2.0, 1: 2.0, 50: 1.0, 99: 0.0}),
        (Linear(warmup=0.1, final=0.1), {0: 0.2, 9: 2.0, 10: 2.0, 99: 0.2}),
        (Linear(warmup=0.01, final=0.0), {0: 2.0, 1: 2.0, 50: 1.0, 99: 0.0}),
        (InverseSqrt(warmup=0.04), {0: 0.5, 3: 2.0, 15: 1.0, 63: 0.5, 99: 0.4}),
        (WarmupStableDecay(warmup=0.1, decay=0.2, final=0.1), {0: 0.2, 9: 2.0, 80: 2.0, 99: 0.2}),
        (WarmupStableDecay(warmup=0.0, decay=0.21, final=0.0), {79: 2.0, 89: 1.0, 99: 0.0}),
        (
            Infinite(warmup=0.1, cooldown=0.3, constant=0.5, annealing=0.2, final=0.125),
            # The cosine's middle is between peak and constant; the annealing's is their geometric mean.
            {0: 0.2, 9: 2.0, 10: 2.0, 25: 1.5, 40: 1.0, 79: 1.0, 89: 0.5, 99: 0.25},
        ),
        (Infinite(warmup=0.1, cooldown=0.3, constant=0.5, annealing=0.0), {40: 1.0, 99: 1.0}),
    ],
)
def test_characteristic_steps(schedule, expected):
    found = rates(schedule, 100)
    assert {step: pytest.approx(found[step], rel=1e-5, abs=1e-7) for step in expected} == expected


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 100])
def test_however_few_the_steps_the_last_one_has_decayed(steps):
    assert rates(WarmupStableDecay(warmup=0, decay=0.3, final=0.1), steps)[-1] == pytest.approx(0.1 * PEAK)
    assert rates(WarmupStableDecay(warmup=0, decay=0, final=0.1), steps)[-1] == PEAK
    # One alone is at the peak.
    assert rates(WarmupStableDecay(warmup=0, decay=0.3, final=0.1), 1) == PEAK


@pytest.mark.parametrize("schedule", [Cosine, Linear])
@pytest.mark.parametrize(("warmup", "steps"), [(0.5, 2), (0.5, 3), (0.8, 5), (0.05, 2), (0.0, 4)])
def test_the_last_step_is_the_final_one_also_where_the_warm_up_leaves_it_alone(schedule, warmup, steps):
    found = rates(schedule(warmup=warmup, final=0.1), steps)
    assert found[-1] == pytest.approx(0.1 * PEAK)
    assert found.max() == pytest.approx(PEAK)
    # There is no step that it could have come down to.
    assert rates(schedule(warmup=warmup, final=0.1), 1) == PEAK
    assert rates(schedule(warmup=1.0, final=0.1), steps)[-1] == PEAK


def test_shares_that_make_up_the_whole_run_are_taken():
    Infinite(warmup=0.33, cooldown=0.56, annealing=0.11)
    WarmupStableDecay(warmup=0.7, decay=0.30000000000000004)
    WarmupStableDecay(warmup=0.0, decay=1.0)


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("steps", [1, 2, 7, 400])
def test_no_step_is_wasted_and_none_is_above_the_peak(schedule, steps):
    found = rates(schedule, steps)
    assert (found > 0).all()
    assert (found <= PEAK * (1 + 1e-6)).all()


@pytest.mark.parametrize("schedule", ALL)
def test_it_rewarms_and_makes_no_jump(schedule):
    found = rates(schedule, 400)
    assert found[0] == pytest.approx(PEAK / 20)
    assert (np.diff(found[:20]) > 0).all()
    assert found.max() == pytest.approx(PEAK)
    # The warm-up is the steepest part, of 1/20 of the peak a step.
    assert np.abs(np.diff(found)).max() <= PEAK / 20 * 1.001
    assert (np.diff(found[20:]) <= 1e-6).all()


def test_an_infinite_schedule_goes_on_from_its_constant_part():
    first = rates(Infinite(annealing=0.0), 100)
    second = rates(Infinite(warmup=0.0, cooldown=0.0), 60)
    assert first[-1] == pytest.approx(second[0])
    joined = np.concatenate([first, second])
    np.testing.assert_allclose(joined[50:145], PEAK * 0.5, rtol=1e-6)
    assert joined[-1] == pytest.approx(PEAK * 0.05)


@pytest.mark.parametrize("schedule", ALL)
def test_configuration_is_json(schedule):
    assert from_json(Schedule, json.loads(json.dumps(to_json(schedule)))) == schedule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(final=1.5), "final is 1.5"),
        (lambda: InverseSqrt(warmup=-0.1), "warmup is -0.1"),
        (lambda: WarmupStableDecay(warmup=0.6, decay=0.5), "more than the whole run"),
        (lambda: Infinite(warmup=0.5, cooldown=0.5, annealing=0.1), "more than the whole run"),
        (lambda: Infinite(final=0.0), "final 0.0 is not above 0"),
        (lambda: Infinite(constant=0.1, final=0.2), "final 0.2 .* constant, 0.1"),
    ],
)
def test_a_share_that_cannot_be_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
