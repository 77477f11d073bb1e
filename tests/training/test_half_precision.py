"""float16: gradients near those of float32, and a training that needs no scale for its loss."""

import functools

import jax
import numpy as np
import pytest
from inputs import random_weights, tiny_config
from training_inputs import losses, training

from cpt_jax.adapt import Full, LoRA
from cpt_jax.core.precision import Precision
from cpt_jax.core.tree import flatten, unflatten
from cpt_jax.models.config import LayerKind
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.models.delta_net import DeltaNetConfig
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.rope import Rope
from cpt_jax.training.loop import train
from cpt_jax.training.loss import make_loss

KINDS = (
    LayerKind(rope=None, mixer=DeltaNetConfig(key_heads=2, value_heads=4, key_dim=8, value_dim=16, kernel_size=4)),
    LayerKind(rope=Rope(theta=1e4, dim=8), window=16),
)
MODELS = {
    "soft caps, in blocks": tiny_config(new_rows=10, attention_softcap=5.0, logit_softcap=3.0, attention="blocks"),
    # Of two experts each: near a tie another choice would be another model.
    "hybrid, with experts": tiny_config(
        layer_kinds=KINDS,
        layer_pattern=(0, 1),
        num_layers=2,
        experts=ExpertsConfig(count=2, per_token=2, renormalise=True, balance_coefficient=0.1),
    ),
}


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 96, (2, 65)).astype(np.int32)
    ones = np.ones((2, 64), np.int32)
    places = np.arange(64, dtype=np.int32)[None]
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": places * ones,
        "segment_ids": ones,
        "domains": 0 * ones,
        "weights": rng.uniform(0, 1, (2, 64)).astype(np.float32),
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_gradient_of_float16_is_nearer_than_one_of_bfloat16(name):
    config = MODELS[name]
    network, weights = abstract_decoder(config), flatten(random_weights(config))

    def gradient(compute):
        loss = make_loss(network, compute, lambda path: True, ["text"])
        found = jax.jit(jax.value_and_grad(lambda leaves: loss(unflatten(leaves), batch())[0]))(weights)
        return jax.tree.map(functools.partial(np.asarray, dtype=np.float64), found)

    def apart(found):
        return np.sqrt(sum(np.sum((found[path] - exact[path]) ** 2) for path in exact))

    total, exact = gradient("float32")
    half, brain = gradient("float16"), gradient("bfloat16")
    np.testing.assert_allclose(half[0], total, rtol=1e-3)
    # Three bits more: an eighth, where nothing is too large or too small for its exponents.
    assert 0 < apart(half[1]) < apart(brain[1]) / 4


@pytest.mark.parametrize("method", [Full(), LoRA(rank=4, alpha=8.0)], ids=["full", "lora"])
def test_a_stage_in_float16_learns_as_one_in_float32(directories, tmp_path, method):
    for compute in ("float32", "float16"):
        precision = Precision(compute=compute)
        train(training(directories, tmp_path / compute, method, steps=8, precision=precision))
    expected, found = (losses(tmp_path / compute) for compute in ("float32", "float16"))
    assert expected != found
    np.testing.assert_allclose(found, expected, rtol=5e-3)


@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_mfu_goes_by_the_peak_of_the_type_computed_in(directories, tmp_path, monkeypatch, compute):
    peaks = {"float32": 8e12, "float16": 65e12}
    monkeypatch.setattr("cpt_jax.training.training.peak_flops", lambda kind, compute: peaks[compute])
    run = training(directories, tmp_path, LoRA(), precision=Precision(compute=compute), devices=2)
    assert run.peak_flops() == 2 * peaks[compute]
