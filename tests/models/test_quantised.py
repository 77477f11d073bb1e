"""Frozen kernels in few bits: near the numbers they stand for, in little memory, and passing gradients on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpt_jax.models.products import grouped_matmul, matmul
from cpt_jax.models.quantised import dense, quantise

# The best 4-bit code of normal numbers is NF4; its 16 levels (QLoRA, appendix E).
NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0]  # fmt: skip


def kernel(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(0, 0.05, shape), jnp.float32)


def test_int8_is_the_nearest_of_255_levels_of_each_output():
    weight = kernel(3, 128, 40)
    found = np.asarray(dense(quantise(weight, "int8"), jnp.dtype("float32")))
    step = np.abs(weight).max(1, keepdims=True) / 127.5
    assert np.abs(found - weight).max() <= (0.5001 * step).max()
    assert quantise(weight, "int8").qvalue.dtype == jnp.int8


def test_nf4_is_the_nearest_level_of_its_block():
    weight = kernel(128, 40)
    found = np.asarray(dense(quantise(weight, "nf4"), jnp.dtype("float32")))
    blocks = np.asarray(weight).reshape(2, 64, 40)
    scale = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs(blocks[..., None] / scale[..., None] - np.array(NF4)).argmin(-1)
    np.testing.assert_allclose(found.reshape(2, 64, 40), np.array(NF4)[nearest] * scale, atol=2e-4)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_products_and_their_gradients_are_those_of_the_dense_kernel(kind):
    weight, x = kernel(64, 24), kernel(5, 64)
    quantised = quantise(weight, kind)
    plain = dense(quantised, jnp.dtype("float32"))
    for function, arguments in (
        (lambda x, w: matmul(x, w, jnp.dtype("float32")), (quantised, plain)),
        (
            lambda x, w: grouped_matmul(x, w, jnp.array([2, 3]), jnp.dtype("float32")),
            (quantise(kernel(2, 64, 24), kind), dense(quantise(kernel(2, 64, 24), kind), jnp.dtype("float32"))),
        ),
    ):
        few, all_bits = arguments
        value, gradient = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(function(x, few))))(x)  # noqa: B023
        expected, expected_gradient = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(function(x, all_bits))))(x)  # noqa: B023
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
