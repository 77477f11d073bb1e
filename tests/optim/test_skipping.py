"""Bad steps change nothing, are counted, and good steps are as they were."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizer_inputs import GRADIENTS, OPTIMIZERS, WEIGHTS, draw, schedule, stepping

from cpt_jax.core.tree import unflatten
from cpt_jax.optim.skipping import skip_bad_steps, skipped


@functools.cache
def build(name="adamw", **changes):
    tree = unflatten({path: jnp.asarray(leaf) for path, leaf in WEIGHTS.items()})
    transform = stepping(dataclasses.replace(OPTIMIZERS[name], **changes), tree)

    @jax.jit
    def step(tree, state, gradients):
        updates, state = transform.update(gradients, state, tree)
        return optax.apply_updates(tree, updates), state

    return tree, transform.init(tree), step


def bad(value: float):
    gradients = draw(99, 0.01)
    gradients["layers/attention/q/kernel"][1, 2, 3] = value
    return unflatten(gradients)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(name, value):
    tree, state, step = build(name)
    tree, state = step(tree, state, unflatten(GRADIENTS[0]))
    for count in (1, 2):
        after, state_after = step(tree, state, bad(value))
        for before, now in zip(jax.tree.leaves(tree), jax.tree.leaves(after), strict=True):
            assert np.asarray(before).tobytes() == np.asarray(now).tobytes()
        old, new = state[0].inner_state, state_after[0].inner_state
        for before, now in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            assert np.asarray(before).tobytes() == np.asarray(now).tobytes()
        assert skipped(state_after) == (count, count)
        tree, state = after, state_after
    tree, state = step(tree, state, unflatten(GRADIENTS[1]))
    assert skipped(state) == (2, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def test_a_norm_far_above_the_usual_is_skipped_once_there_is_a_usual_one():
    tree, state, step = build(skip_above=10.0)
    small, large = unflatten(draw(3, 0.01)), unflatten(draw(4, 0.5))
    tree, state = step(tree, state, large)
    assert skipped(state) == (0, 0)
    tree, state, _ = build(skip_above=10.0)
    for _ in range(20):
        tree, state = step(tree, state, small)
    usual = float(state[0].usual_norm)
    assert usual == pytest.approx(float(optax.tree.norm(small)), rel=1e-5)
    after, state = step(tree, state, large)
    assert skipped(state) == (1, 1)
    assert float(state[0].usual_norm) == usual
    np.testing.assert_array_equal(after["embed"]["base"], tree["embed"]["base"])
    _, state = step(after, state, jax.tree.map(lambda leaf: leaf * 9, small))
    assert skipped(state) == (1, 0)


def test_the_usual_norm_is_the_mean_over_the_last_hundred_that_were_taken():
    """Against a loop over NumPy: the first 20 are taken whatever their norms are."""
    norms = np.random.default_rng(0).uniform(1, 2, 150)
    norms[[5, 19, 20, 60, 140]], norms[[7, 70]] = 100, np.nan
    above, usual, taken, expected = 4.0, 0.0, 0, []
    for norm in norms:
        if np.isfinite(norm) and (taken < 20 or norm <= above * usual):
            taken += 1
            usual += (norm - usual) / min(taken, 100)
        expected.append((taken, usual))
    transform = skip_bad_steps(optax.identity(), above)

    def step(state, norm):
        state = transform.update({"x": norm[None]}, state)[1]
        return state, (state.taken, state.usual_norm)

    start = transform.init({"x": jnp.zeros(1)})
    found = jax.lax.scan(step, start, jnp.asarray(norms, jnp.float32))[1]
    np.testing.assert_allclose(np.stack(found, axis=1), expected, rtol=1e-5)
    assert taken == 146


@pytest.mark.parametrize("above", [None, 10.0])
def test_good_steps_are_bit_for_bit_those_without(above):
    # The older emitters of fusions, which compile quickly, round a sum of products by what else is in the program.
    newer_emitters = {"xla_backend_extra_options": ""}
    tree = unflatten({path: jnp.asarray(leaf) for path, leaf in WEIGHTS.items()})
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    results = []
    for first in (inner, skip_bad_steps(inner, above)):
        transform = optax.chain(first, optax.scale_by_learning_rate(schedule))
        update = jax.jit(transform.update, compiler_options=newer_emitters)
        weights, state = tree, transform.init(tree)
        for each in GRADIENTS:
            updates, state = update(unflatten(each), state, weights)
            weights = optax.apply_updates(weights, updates)
        results.append(weights)
    jax.tree.map(np.testing.assert_array_equal, *results)
