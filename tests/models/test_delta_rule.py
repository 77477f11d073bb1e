"""The gated delta rule in chunks against its recurrence, token by token, in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpt_jax.models.causal_conv import causal_conv
from cpt_jax.models.delta_rule import CHUNK, gated_delta_rule, inverse_of_unit_lower
from cpt_jax.models.kernels.visible import Visible, document_begins

FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
HEADS, SHARED, KEY, VALUE = 2, 3, 8, 5
# One document; several, that end within and at a chunk's edge; less than a chunk.
ROWS = {
    "one": [200],
    "several": [1, 20, CHUNK - 21, 2 * CHUNK, 30, 7],
    "at edges": [CHUNK, CHUNK],
    "short": [9, 4],
}


def inputs(length: int, seed: int = 0) -> list[np.ndarray]:
    """q, k, v, log decay, beta; keys of length one that are much alike, so that writes take out each other."""
    generator = np.random.default_rng(seed)
    q, k = (generator.normal(size=(2, length, HEADS, KEY)) + 1.0 for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = generator.normal(size=(2, length, HEADS, SHARED, VALUE))
    log_decay = -generator.exponential(0.3, (2, length, HEADS, SHARED))
    return [q, k, v, log_decay, generator.uniform(size=(2, length, HEADS, SHARED))]


def recurrence(q, k, v, log_decay, beta, begins, state=None, first=0):
    """As the paper writes it. `first`: the place of the first token."""
    mixed = np.zeros(v.shape)
    state = np.zeros((2, HEADS, SHARED, KEY, VALUE)) if state is None else state.copy()
    for row, head, shared in np.ndindex(2, HEADS, SHARED):
        s = state[row, head, shared]
        for t in range(q.shape[1]):
            if begins[row, t] == first + t:
                s = np.zeros((KEY, VALUE))
            s = np.exp(log_decay[row, t, head, shared]) * s
            key = k[row, t, head]
            s = s + beta[row, t, head, shared] * np.outer(key, v[row, t, head, shared] - key @ s)
            mixed[row, t, head, shared] = q[row, t, head] @ s
        state[row, head, shared] = s
    return mixed, state


def begins_of(lengths: list[int]) -> np.ndarray:
    segments = np.repeat(np.arange(len(lengths)), lengths)
    return np.asarray(document_begins(jnp.asarray(np.stack([segments, np.zeros_like(segments)]))))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(FLOAT32, 2e-5), (BFLOAT16, 3e-2)])
def test_chunks_are_the_recurrence(rows, dtype, tolerance):
    begins, given = begins_of(ROWS[rows]), inputs(sum(ROWS[rows]))
    expected, last = recurrence(*given, begins)
    float32 = [jnp.asarray(x, jnp.float32) for x in given]
    found, state = jax.jit(lambda *x: gated_delta_rule(*x, Visible(jnp.asarray(begins)), dtype))(*float32)
    np.testing.assert_allclose(found, expected, atol=tolerance)
    np.testing.assert_allclose(state, last, atol=tolerance)


@pytest.mark.parametrize("rows", ["several", "short"])
def test_gradients_are_the_recurrences(rows):
    """By central differences of the recurrence, in random directions."""
    begins, given = begins_of(ROWS[rows]), inputs(sum(ROWS[rows]))
    generator = np.random.default_rng(1)
    weights = generator.normal(size=given[2].shape)

    def loss(*x):
        return jnp.sum(gated_delta_rule(*x, Visible(jnp.asarray(begins)), FLOAT32)[0] * weights)

    gradients = jax.jit(jax.grad(loss, argnums=range(5)))(*(jnp.asarray(x, jnp.float32) for x in given))
    for number, gradient in enumerate(gradients):
        direction = generator.normal(size=gradient.shape)
        moved = [[x + sign * 1e-5 * direction if i == number else x for i, x in enumerate(given)] for sign in (1, -1)]
        above, below = (np.sum(recurrence(*x, begins)[0] * weights) for x in moved)
        np.testing.assert_allclose(np.sum(gradient * direction), (above - below) / 2e-5, rtol=2e-3, atol=2e-3)


def test_a_row_goes_on_where_it_ended():
    """A prompt with padding before it, then tokens one by one and several at once."""
    length, padding = 150, 11
    begins, given = np.full((2, length), padding), inputs(length)
    expected, last = recurrence(*(x[:, padding:] for x in given), begins[:, padding:], first=padding)
    state, found = None, []
    for first, end in ((0, 100), (100, 101), (101, 102), (102, 150)):
        part = [jnp.asarray(x[:, first:end], jnp.float32) for x in given]
        visible = Visible(jnp.asarray(begins[:, first:end]), index=jnp.int32(first))
        mixed, state = gated_delta_rule(*part, visible, FLOAT32, state)
        found.append(mixed)
    np.testing.assert_allclose(np.concatenate(found, axis=1)[:, padding:], expected, atol=2e-5)
    np.testing.assert_allclose(state, last, atol=2e-5)


def test_the_convolution_is_torchs_within_each_document():
    import torch

    generator = np.random.default_rng(0)
    lengths, channels, size = [1, 2, 9, 4], 6, 4
    x = generator.normal(size=(2, sum(lengths), channels)).astype(np.float32)
    kernel = generator.normal(size=(channels, 1, size)).astype(np.float32)

    def alone(part: np.ndarray) -> np.ndarray:
        padded = torch.nn.functional.pad(torch.tensor(part).T[None], (size - 1, 0))
        return torch.nn.functional.conv1d(padded, torch.tensor(kernel), groups=channels)[0].T.numpy()

    expected = [alone(part) for part in np.split(x[0], np.cumsum(lengths)[:-1])]
    y, state = causal_conv(jnp.asarray(x), jnp.asarray(kernel), Visible(jnp.asarray(begins_of(lengths))))
    np.testing.assert_allclose(y[0], np.concatenate(expected), atol=1e-5)
    np.testing.assert_allclose(y[1], alone(x[1]), atol=1e-5)
    np.testing.assert_array_equal(state, x[:, 1 - size :])


def test_the_convolution_goes_on_where_it_ended():
    generator = np.random.default_rng(0)
    x, kernel = generator.normal(size=(2, 12, 3)), generator.normal(size=(3, 1, 3))
    begins = jnp.full((2, 12), 2)
    whole, last = causal_conv(jnp.asarray(x), jnp.asarray(kernel), Visible(begins))
    state, found = None, []
    for first, end in ((0, 5), (5, 6), (6, 12)):
        visible = Visible(begins[:, first:end], index=first)
        y, state = causal_conv(jnp.asarray(x[:, first:end]), jnp.asarray(kernel), visible, state)
        found.append(y)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, atol=1e-6)
    np.testing.assert_array_equal(state, last)
    assert not np.asarray(whole[:, :2]).any()


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_the_inverse_is_numpys(size):
    """Of what lies on and above the diagonal nothing is read; rows much alike, as those of like keys are."""
    generator = np.random.default_rng(size)
    system = generator.uniform(0.5, 1.0, (3, size, size))
    lower = np.tril(system, -1) + np.eye(size)
    inverse, backward = jax.vjp(inverse_of_unit_lower, jnp.asarray(system, jnp.float32))
    np.testing.assert_allclose(inverse, np.linalg.inv(lower), atol=1e-5)
    cotangent = generator.normal(size=system.shape)
    expected = np.tril(-np.einsum("bji,bjk,blk->bil", np.linalg.inv(lower), cotangent, np.linalg.inv(lower)), -1)
    np.testing.assert_allclose(backward(jnp.asarray(cotangent, jnp.float32))[0], expected, atol=1e-4)
