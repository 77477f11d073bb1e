"""The first layers without experts, and experts chosen in groups, by a bias: however they are compiled, cut and grouped,
the model is the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import random_weights, tiny_config
from method_inputs import TOKENS, forward, trained
from models.test_hybrid import KINDS, LORA, assert_close, on_mesh, value_and_gradients

from cpt_jax.adapt import ByPath, Expand, Full
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import FLOAT32
from cpt_jax.core.tree import flatten, unflatten
from cpt_jax.models.config import LayerKind
from cpt_jax.models.decoder import abstract_decoder, apply_with_balance
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.generate import generate
from cpt_jax.models.layer_groups import split_layers, with_copies
from cpt_jax.models.lone_feed_forward import LoneExpertsConfig
from cpt_jax.models.remat import Remat
from cpt_jax.models.router import RouterConfig
from cpt_jax.recipe.model import Model

ROUTER = RouterConfig(scores="sigmoid", correction_bias=True, groups=2, chosen_groups=1, scale=1.5)
EXPERTS = ExpertsConfig(
    count=8,
    per_token=2,
    renormalise=True,
    balance_coefficient=0.1,
    shared_intermediate_size=24,
    shared_gate=False,
    intermediate_size=16,
    router=ROUTER,
)


def dense_first(**changes):
    """A convolution and attention without experts, then twice attention and a convolution with them."""
    kinds = dict(layer_kinds=KINDS[1:3], layer_pattern=(1, 0, 0, 1, 0, 1), num_layers=6, dense_layers=2)
    return tiny_config(**kinds | dict(experts=EXPERTS, attention="xla", intermediate_size=80) | changes)


@functools.cache
def expected():
    weights = jax.tree.map(jnp.asarray, random_weights(dense_first(), lora=LORA))
    return value_and_gradients(dense_first(), weights, LORA)


@pytest.mark.parametrize("changes", [dict(layer_loop="unroll"), dict(remat=Remat(products=True))], ids=str)
def test_one_by_one_and_recomputed_the_model_is_the_same(changes):
    weights = jax.tree.map(jnp.asarray, random_weights(dense_first(), lora=LORA))
    assert_close(value_and_gradients(dense_first(**changes), weights, LORA), expected())


@pytest.mark.parametrize("sizes", [dict(expert=4, fsdp=2), dict(expert=2, fsdp=2, tensor=2)], ids=str)
def test_on_a_mesh_the_model_is_the_same(sizes):
    assert_close(on_mesh(dense_first(), sizes, LORA), expected())


def lone_experts(**changes):
    """Experts without gates in the place of what mixes tokens, in every other layer."""
    kinds = dict(layer_kinds=(KINDS[1], LayerKind(rope=None, mixer=LoneExpertsConfig())), layer_pattern=(0, 1) * 2)
    alone = dict(num_layers=4, feed_forward=False, gated=False, activation="relu2", experts=EXPERTS, attention="xla")
    return tiny_config(**kinds | alone | changes)


def test_unrolled_and_on_a_mesh_experts_alone_are_the_same():
    config = lone_experts()
    weights = jax.tree.map(jnp.asarray, random_weights(config, lora=LORA))
    right = value_and_gradients(config, weights, LORA)
    assert flatten(right[1])["layers/lone_experts/shared/up/lora_a"].any()
    assert_close(value_and_gradients(lone_experts(layer_loop="unroll"), weights, LORA), right)
    assert_close(on_mesh(config, dict(expert=2, fsdp=2, tensor=2), LORA), right)


def test_stacks_hold_the_layers_that_have_them():
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_decoder(dense_first()).shapes).items()}
    assert shapes["layers/dense/mlp/up/kernel"] == (2, 32, 80)
    assert shapes["layers/dense/attention/q/kernel"][0] == shapes["layers/dense/short_conv/q/kernel"][0] == 1
    assert shapes["layers/mlp/up/kernel"] == (4, 8, 32, 16)
    assert shapes["layers/mlp/shared/up/kernel"] == (4, 32, 24)
    assert shapes["layers/mlp/correction_bias"] == (4, 8)
    assert shapes["layers/attention/q/kernel"][0] == shapes["layers/short_conv/q/kernel"][0] == 2
    assert dense_first().layers_with("dense/attention/q/kernel") == (1,)
    assert dense_first().layers_with("attention/q/kernel") == (2, 4)
    assert dense_first().layers_with("mlp/router") == (2, 3, 4, 5)


@pytest.mark.parametrize("config", [dense_first(), lone_experts()], ids=["dense first", "alone"])
def test_the_balance_is_of_the_layers_with_experts_alone(config):
    """Of an even load it is the number of experts a token, whatever the number of layers without."""
    flat = flatten(jax.tree.map(jnp.asarray, random_weights(config)))
    flat[f"layers/{config.experts_name}/router"] *= 0
    network, tokens = abstract_decoder(config), jnp.asarray(TOKENS, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(24)[None], tokens.shape)
    _, balance = apply_with_balance(network, unflatten(flat), tokens, positions, None, compute_dtype="float32")
    np.testing.assert_allclose(balance, 2.0, rtol=1e-5)


@pytest.mark.parametrize("layers", [(0, 1), (1, 4)], ids=str)
def test_by_groups_of_layers_the_model_is_the_same(layers):
    base, method = model(), ByPath(patterns=("layers/*",), layers=layers)
    grouped = base.adapted(method, seed=0)
    np.testing.assert_allclose(forward(grouped), forward(base), atol=1e-5)
    moved = trained(grouped, method)
    np.testing.assert_allclose(forward(moved.merged()), forward(moved), atol=1e-4)
    assert np.abs(forward(moved) - forward(base)).max() > 0.01
    prompts = [TOKENS[0, :3].tolist(), TOKENS[1, :17].tolist()]
    whole, found = (
        generate(each.network, each.on_device(FLOAT32), prompts, new_tokens=20) for each in (moved.merged(), moved)
    )
    assert found == whole


def test_added_blocks_are_copies_with_experts_or_without():
    base, method = model(), Expand(blocks=3)
    deeper = method.layout(base.config)
    assert deeper.dense_layers == 3
    copied = split_layers(with_copies(base.weights, base.config, method.order(6)), deeper)
    flat = flatten(copied)
    assert not np.asarray(flat["layers/added_0/dense/mlp/down/kernel"]).any()
    bias = base.weights["layers"]["mlp"]["correction_bias"]
    np.testing.assert_array_equal(np.asarray(flat["layers/added_1/mlp/correction_bias"])[0], bias[1])
    np.testing.assert_allclose(forward(Model(config=deeper, weights=copied, hf_config={})), forward(base), atol=1e-5)


def model() -> Model:
    return Model(config=dense_first(), weights=random_weights(dense_first()), hf_config={})


def test_full_training_leaves_the_bias_alone():
    paths = flatten(abstract_decoder(dense_first()).shapes)
    assert {path for path in paths if not Full().trains(path)} == {"layers/mlp/correction_bias"}


@pytest.mark.parametrize("changes", [dict(experts=None), dict(dense_layers=6)], ids=["no experts", "all dense"])
def test_layers_without_experts_come_before_layers_with_them(changes):
    with pytest.raises(UserError, match="of 6 layers have no experts: the others must"):
        dense_first(**changes)
