"""Tokens are drawn from the distribution of transformers, as often as they are likely."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpt_jax.core.errors import UserError
from cpt_jax.models.sampling import Sampling, choose, filtered, row_keys

WARPED = {
    "temperature": dict(temperature=0.7),
    "top-k": dict(temperature=1.0, top_k=5),
    "top-k above the vocabulary": dict(temperature=1.0, top_k=500),
    "top-p": dict(temperature=1.0, top_p=0.6),
    "the likeliest alone": dict(temperature=1.0, top_p=0.01),
    "all": dict(temperature=1.8, top_k=30, top_p=0.8),
}


@pytest.mark.parametrize("vocabulary", [100, 3000])
@pytest.mark.parametrize("settings", WARPED.values(), ids=WARPED)
def test_the_distribution_is_that_of_the_warpers_of_transformers(settings, vocabulary):
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * np.random.default_rng(0).normal(size=(16, vocabulary)).astype(np.float32)
    expected = TemperatureLogitsWarper(settings["temperature"])(None, torch.tensor(logits))
    if "top_k" in settings:
        expected = TopKLogitsWarper(settings["top_k"])(None, expected)
    if "top_p" in settings:
        expected = TopPLogitsWarper(settings["top_p"])(None, expected)
    found = filtered(jnp.asarray(logits), Sampling(**settings))
    np.testing.assert_array_equal(np.isfinite(found), torch.isfinite(expected).numpy())
    np.testing.assert_allclose(jax.nn.softmax(found), expected.softmax(-1).numpy(), rtol=1e-5, atol=1e-6)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    draws = 20_000
    logits = np.random.default_rng(0).normal(size=12).astype(np.float32)
    sampling = Sampling(temperature=0.8, top_k=6, top_p=0.9)
    expected = np.asarray(jax.nn.softmax(filtered(jnp.asarray(logits)[None], sampling)[0]))
    assert 1 < np.count_nonzero(expected) < 6
    keys = row_keys(3, np.arange(draws, dtype=np.uint32))
    drawn = choose(jnp.tile(jnp.asarray(logits)[None], (draws, 1)), keys, np.full(draws, 7), sampling)
    shares = np.bincount(np.asarray(drawn), minlength=12) / draws
    assert set(np.flatnonzero(shares)) == set(np.flatnonzero(expected))
    # Five standard deviations.
    np.testing.assert_allclose(shares, expected, atol=5 * 0.5 * draws**-0.5)


def test_over_many_blocks_of_the_vocabulary_too():
    """10 tokens of 1,000 have a weight that counts, 5 of them in one block; the others are cut or next to impossible."""
    draws, likely = 20_000, np.asarray([0, 127, 128, 129, 131, 200, 255, 640, 998, 999])
    logits = np.full(1000, -40, np.float32)
    logits[likely] = np.random.default_rng(0).normal(size=len(likely))
    expected = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
    keys = row_keys(0, np.arange(draws, dtype=np.uint32))
    for sampling in (Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=len(likely))):
        drawn = choose(jnp.tile(jnp.asarray(logits)[None], (draws, 1)), keys, np.zeros(draws, int), sampling)
        shares = np.bincount(np.asarray(drawn), minlength=1000) / draws
        assert set(np.flatnonzero(shares)) == set(likely)
        np.testing.assert_allclose(shares, expected, atol=5 * 0.5 * draws**-0.5)


@pytest.mark.parametrize("temperature", [1e-6, 1e-37, 1e-38, 1e-40, 1e-300])
@pytest.mark.parametrize("cut", [{}, dict(top_k=5), dict(top_p=0.9)], ids=str)
def test_near_a_temperature_of_zero_the_likeliest_is_drawn(temperature, cut):
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 5, (4, 320)), jnp.float32)
    keys = row_keys(3, np.arange(4, dtype=np.uint32))
    found = choose(logits, keys, jnp.zeros(4, jnp.int32), Sampling(temperature=temperature, **cut))
    np.testing.assert_array_equal(found, logits.argmax(-1))


def test_equal_tokens_at_the_edge_all_stay():
    logits = jnp.asarray([[2.0, 1.0, 1.0, 0.0, 1.0]])
    for sampling in (Sampling(temperature=1.0, top_k=2), Sampling(temperature=1.0, top_p=0.5)):
        np.testing.assert_array_equal(np.isfinite(filtered(logits, sampling)), [[True, True, True, False, True]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=-1.0), "temperature is -1.0: give 0"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature=1.0, top_k=0), "top_k is 0: give at least 1"),
        (dict(temperature=1.0, top_p=0.0), "top_p is 0.0: give a share above 0"),
        (dict(temperature=1.0, top_p=1.5), "top_p is 1.5"),
        (dict(top_p=0.9), "top_p is 0.9 and temperature 0"),
        (dict(top_k=3), "top_k is 3 and temperature 0"),
        (dict(seed=-1), "seed is -1"),
    ],
)
def test_wrong_sampling_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)
