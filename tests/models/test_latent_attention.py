"""Latent attention with a cache, which holds less and computes otherwise than training does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import random_weights, tiny_config
from models.test_hybrid import KINDS

from cpt_jax.core.tree import flatten, unflatten
from cpt_jax.models.decoder import abstract_decoder, apply, logits
from cpt_jax.models.generate import _functions
from cpt_jax.models.linear import LoRAConfig, with_magnitudes
from cpt_jax.models.quantised import quantise

LATENT = KINDS[4]
CONFIG = tiny_config(layer_kinds=(LATENT,), num_layers=3)


@pytest.mark.parametrize("kernels", ["float32", "int8"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_cached_text_is_that_of_a_whole_row_with_adapters_too(dora, kernels):
    lora = LoRAConfig(rank=3, alpha=6.0, dora=dora)
    network = abstract_decoder(CONFIG, lora)
    drawn = flatten(random_weights(CONFIG, lora=lora))
    drawn = with_magnitudes(
        unflatten({path: leaf for path, leaf in drawn.items() if not path.endswith("magnitude")}), lora
    )
    flat = flatten(jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), drawn))
    if kernels == "int8":
        flat |= {path: quantise(leaf, "int8") for path, leaf in flat.items() if path.endswith("_b/kernel")}
    weights = unflatten(flat)
    row = np.random.default_rng(0).integers(3, 320, (1, 65), dtype=np.int32)
    read_prompts, read_tokens = _functions(network, jnp.dtype("float32"))
    first = np.zeros(1, np.int32)
    read, caches = read_prompts(weights, row[:, :64], first, np.int32(63), length=128)
    then, _ = read_tokens(weights, jnp.asarray(row[:, 64]), first, caches, np.int32(64))
    hidden = apply(network, weights, row, jnp.arange(65)[None], None, compute_dtype="float32")
    expected = logits(network, weights, hidden, compute_dtype="float32")[0]
    np.testing.assert_allclose(jnp.concatenate([read, then]), expected[63:], atol=1e-4)


def test_the_cache_holds_latents_and_the_part_of_keys_that_turns():
    network, weights = abstract_decoder(CONFIG), random_weights(CONFIG)
    read_prompts, _ = _functions(network, jnp.dtype("bfloat16"))
    _, caches = read_prompts(weights, np.ones((2, 64), np.int32), np.zeros(2, np.int32), np.int32(63), length=128)
    (cache,) = caches.values()
    assert [each.shape for each in cache.parts] == [(3, 2, 1, 128, 6), (3, 2, 1, 128, 10)]
    assert {each.dtype for each in cache.parts} == {jnp.dtype("bfloat16")}
