"""Attention to a cache is attention to the keys and values that are in it, whatever the blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpt_jax.models.kernels import cached as module
from cpt_jax.models.kernels.cached import KeyCache, cached
from cpt_jax.models.kernels.reference import reference
from cpt_jax.models.kernels.visible import Visible

LAYERS, BATCH, GROUPS, HEADS, ROOM = 3, 2, 2, 4, 100
WIDTHS = (16, 8)


def filled(dtype=jnp.float32) -> KeyCache:
    cache, rng = KeyCache.empty(LAYERS, BATCH, GROUPS, ROOM, WIDTHS, dtype), np.random.default_rng(0)
    return cache._replace(parts=tuple(jnp.asarray(rng.normal(size=p.shape), p.dtype) for p in cache.parts), layer=1)


def queries(length: int):
    return jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, HEADS, length, WIDTHS[0])), jnp.float32)


@pytest.mark.parametrize("block", [7, 64, 512])
@pytest.mark.parametrize(
    ("index", "length", "begins", "window", "softcap", "with_sinks"),
    [
        (0, 1, (0, 0), None, None, False),
        (99, 1, (0, 60), None, None, False),
        (30, 40, (3, 50), None, 5.0, True),
        (80, 1, (3, 75), 12, None, True),
        (40, 20, (0, 41), 9, 2.0, False),
    ],
)
def test_a_cache_is_read_as_the_formula_says(index, length, begins, window, softcap, with_sinks, block, monkeypatch):
    monkeypatch.setattr(module, "CPU_BLOCK", block)
    cache, q = filled(), queries(length)
    visible = Visible(jnp.broadcast_to(jnp.asarray(begins)[:, None], (BATCH, length)), index=jnp.int32(index))
    sinks = jnp.asarray([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    last = index + length
    k, v = (part[1, :, :, :last] for part in cache.parts)
    each = None if sinks is None else jnp.broadcast_to(sinks[None], (BATCH, HEADS))
    expected = reference(q, k, v, visible, (window,), softcap, jnp.dtype("float32"), each)
    found = jax.jit(lambda q, cache: cached(q, cache, visible, (window,), softcap, jnp.dtype("float32"), sinks))(
        q, cache
    )
    places = index + np.arange(length)
    # Queries in places before their row's beginning see nothing, and are finite.
    sees = places[None] >= np.asarray(begins)[:, None]
    assert np.isfinite(found).all()
    for row in range(BATCH):
        np.testing.assert_allclose(found[row][:, sees[row]], expected[row][:, sees[row]], rtol=2e-5, atol=2e-6)


def test_blocks_that_no_query_sees_are_not_read(monkeypatch):
    monkeypatch.setattr(module, "CPU_BLOCK", 10)
    cache, places = filled(), jnp.arange(ROOM)[:, None]
    # The query in place 39 sees 12 keys, from place 28 on.
    unread = (places < 20) | (places >= 40)
    cache = cache._replace(parts=tuple(jnp.where(unread, jnp.nan, part) for part in cache.parts))
    visible = Visible(jnp.zeros((BATCH, 1), jnp.int32), index=39)
    assert np.isfinite(cached(queries(1), cache, visible, (12,), None, jnp.dtype("float32"))).all()


def test_what_is_written_is_read_and_other_layers_stay():
    cache = filled(jnp.bfloat16)
    new = [np.full((BATCH, GROUPS, 2, width), 3.0, np.float32) for width in WIDTHS]
    after = cache.written(new, jnp.int32(5))
    for part, before, read in zip(after.parts, cache.parts, after.read(jnp.int32(4), 4), strict=True):
        assert part.dtype == jnp.bfloat16
        assert (part[1, :, :, 5:7] == 3).all()
        np.testing.assert_array_equal(read, part[1, :, :, 4:8])
        np.testing.assert_array_equal(part[jnp.asarray([0, 2])], before[jnp.asarray([0, 2])])
        np.testing.assert_array_equal(part[1, :, :, :5], before[1, :, :, :5])
