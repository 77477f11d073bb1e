"""Mamba 2's state space in chunks against its recurrence, token by token, in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_delta_rule import BFLOAT16, FLOAT32, begins_of

from cpt_jax.models.kernels.visible import Visible
from cpt_jax.models.state_space import CHUNK, state_space

GROUPS, HEADS, KEY, VALUE = 2, 3, 8, 5
# Documents that end within and at a chunk's edge; one document; less than a chunk.
ROWS = {"several": [1, 20, CHUNK - 21, CHUNK, 30, 7], "one": [2 * CHUNK + 9], "short": [9, 4]}


def inputs(length: int) -> list[np.ndarray]:
    """q, k, v, log decay: some heads keep hundreds of tokens, some a few."""
    generator = np.random.default_rng(0)
    q, k = (generator.normal(size=(2, length, GROUPS, KEY)) * KEY**-0.5 for _ in range(2))
    v = generator.normal(size=(2, length, GROUPS, HEADS, VALUE))
    return [q, k, v, -generator.exponential([0.001, 0.1, 3.0], v.shape[:-1])]


def recurrence(q, k, v, log_decay, begins, first=0):
    """As the paper writes it. `first`: the place of the first token."""
    mixed, state = np.zeros(v.shape), np.zeros((2, GROUPS, KEY, HEADS, VALUE))
    for row, group, head in np.ndindex(2, GROUPS, HEADS):
        s = np.zeros((KEY, VALUE))
        for t in range(q.shape[1]):
            if begins[row, t] == first + t:
                s = np.zeros((KEY, VALUE))
            s = np.exp(log_decay[row, t, group, head]) * s + np.outer(k[row, t, group], v[row, t, group, head])
            mixed[row, t, group, head] = q[row, t, group] @ s
        state[row, group, :, head] = s
    return mixed, state


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(FLOAT32, 3e-5), (BFLOAT16, 0.1)])
def test_chunks_are_the_recurrence(rows, dtype, tolerance):
    begins, given = begins_of(ROWS[rows]), inputs(sum(ROWS[rows]))
    expected, last = recurrence(*given, begins)
    float32 = [jnp.asarray(x, jnp.float32) for x in given]
    found, state = jax.jit(lambda *x: state_space(*x, Visible(jnp.asarray(begins)), dtype))(*float32)
    # Decays are differences of sums over a chunk, which strong ones make large.
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance / 5)
    np.testing.assert_allclose(state, last, atol=tolerance, rtol=tolerance / 5)


def test_gradients_are_the_recurrences():
    """By central differences of the recurrence, in random directions."""
    begins, given = begins_of(ROWS["several"]), inputs(sum(ROWS["several"]))
    generator = np.random.default_rng(1)
    weights = generator.normal(size=given[2].shape)

    def loss(*x):
        return jnp.sum(state_space(*x, Visible(jnp.asarray(begins)), FLOAT32)[0] * weights)

    gradients = jax.jit(jax.grad(loss, argnums=range(4)))(*(jnp.asarray(x, jnp.float32) for x in given))
    for number, gradient in enumerate(gradients):
        direction = generator.normal(size=gradient.shape)
        moved = [[x + sign * 1e-5 * direction if i == number else x for i, x in enumerate(given)] for sign in (1, -1)]
        above, below = (np.sum(recurrence(*x, begins)[0] * weights) for x in moved)
        np.testing.assert_allclose(np.sum(gradient * direction), (above - below) / 2e-5, rtol=2e-3, atol=2e-3)


def test_a_row_goes_on_where_it_ended():
    """A prompt with padding before it, then tokens one by one and several at once."""
    length, padding = 200, 11
    begins, given = np.full((2, length), padding), inputs(length)
    expected, last = recurrence(*(x[:, padding:] for x in given), begins[:, padding:], first=padding)
    state, found = None, []
    for first, end in ((0, 40), (40, 41), (41, 42), (42, 200)):
        part = [jnp.asarray(x[:, first:end], jnp.float32) for x in given]
        visible = Visible(jnp.asarray(begins[:, first:end]), index=jnp.int32(first))
        mixed, state = state_space(*part, visible, FLOAT32, state)
        found.append(mixed)
    np.testing.assert_allclose(np.concatenate(found, axis=1)[:, padding:], expected, atol=2e-5)
    np.testing.assert_allclose(state, last, atol=2e-5)
