"""Rotary frequencies at settings that few released models have are those of transformers."""

import numpy as np
import pytest

from cpt_jax.models.rope import Llama3, Proportional, Rope, Yarn

YARN = {
    "as released": dict(factor=4.0, original_length=4096),
    "not truncated": dict(factor=4.0, original_length=4096, truncate=False),
    "other rotations": dict(factor=40.0, original_length=4096, beta_fast=16.0, beta_slow=2.0),
    "one boundary": dict(factor=4.0, original_length=4096, beta_fast=1.0, truncate=False),
    "boundaries outside": dict(factor=4.0, original_length=16, beta_slow=1e-9),
}


def of_transformers(kind: str, dim: int, **parameters) -> np.ndarray:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=4 * dim, num_attention_heads=4, head_dim=dim, max_position_embeddings=1 << 17,
        rope_parameters=dict(rope_type=kind, rope_theta=10_000.0) | parameters,
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0].numpy()


@pytest.mark.parametrize("settings", YARN.values(), ids=YARN)
def test_yarn(settings):
    found = Rope(theta=10_000.0, dim=32, scaling=Yarn(attention_factor=1.0, **settings)).frequencies()
    others = {name: value for name, value in settings.items() if name != "original_length"}
    expected = of_transformers(
        "yarn", 32, original_max_position_embeddings=settings["original_length"], **dict(beta_slow=1.0) | others
    )
    np.testing.assert_allclose(found, expected, rtol=2e-7)


def test_llama3():
    scaling = Llama3(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=64)
    expected = of_transformers(
        "llama3", 32, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
    np.testing.assert_allclose(Rope(theta=10_000.0, dim=32, scaling=scaling).frequencies(), expected, rtol=2e-7)


@pytest.mark.parametrize("share", [0.5, 0.3, 1.0])
def test_proportional(share):
    scaling = Proportional(pairs=int(share * 16), factor=2.0)
    expected = of_transformers("proportional", 32, partial_rotary_factor=share, factor=2.0)
    np.testing.assert_allclose(Rope(theta=10_000.0, dim=32, scaling=scaling).frequencies(), expected, rtol=2e-7)
