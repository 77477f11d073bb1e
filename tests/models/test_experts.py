"""Experts spread over devices compute what one device computes; adapters on them merge; loads are counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import random_weights, tiny_config

from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.tree import flatten, unflatten
from cpt_jax.models.decoder import abstract_decoder, apply, apply_with_balance
from cpt_jax.models.experts import Balance, ClampedSwiGLU, ExpertsConfig, load_balancing_loss
from cpt_jax.models.linear import LoRAConfig, merge_lora
from cpt_jax.sharding.mesh import MeshShape, make_mesh
from cpt_jax.sharding.placement import place
from cpt_jax.sharding.rules import shardings
from cpt_jax.training.loss import make_loss
from cpt_jax.training.training import place_weights

EXPERTS = ExpertsConfig(count=4, per_token=2, renormalise=True, balance_coefficient=0.1)
SHARED = dataclasses.replace(EXPERTS, shared_intermediate_size=24)
BIASED = dataclasses.replace(EXPERTS, bias=True, swiglu=ClampedSwiGLU(alpha=1.702, limit=0.5))
LORA = LoRAConfig(rank=4, alpha=8, targets=("layers/*",))


def batch(rows: int = 8, length: int = 16) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    whole = {
        "inputs": generator.integers(0, 320, (rows, length)),
        "targets": generator.integers(0, 320, (rows, length)),
        "positions": np.broadcast_to(np.arange(length), (rows, length)),
        "segment_ids": np.ones((rows, length)),
        "domains": np.zeros((rows, length)),
    }
    return {name: array.astype(np.int32) for name, array in whole.items()} | {
        "weights": np.ones((rows, length), np.float32)
    }


def loss_and_gradients(config, sizes, given):
    """(the weights on a mesh; of the mesh; of one device)."""
    network, weights = abstract_decoder(config, LORA), random_weights(config, lora=LORA)
    loss = make_loss(network, jnp.dtype("float32"), lambda path: True, ("text",))
    gradient = jax.value_and_grad(lambda weights, batch: loss(weights, batch)[0])
    expected = jax.jit(gradient)(weights_on_device(weights), given)
    mesh = make_mesh(shape=MeshShape(**sizes))
    where = shardings(network.logical_axes, network.shapes, mesh)
    placed = jax.tree.map(lambda leaf, sharding: place(leaf, leaf.dtype, sharding), weights, where)
    with jax.set_mesh(mesh):
        return placed, jax.jit(gradient)(placed, given), expected


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    references = flatten(expected[1])
    for path, leaf in flatten(found[1]).items():
        atol = 1e-4 * float(jnp.abs(references[path]).max())
        np.testing.assert_allclose(leaf, references[path], rtol=1e-3, atol=atol, err_msg=path)


@pytest.mark.parametrize(
    ("sizes", "experts"),
    [
        (dict(expert=4, fsdp=2), SHARED),
        (dict(expert=2, tensor=4, fsdp=1), SHARED),
        (dict(expert=2, context=2, fsdp=2), SHARED),
        (dict(expert=2, tensor=4, fsdp=1), BIASED),
        (dict(expert=2, context=2, fsdp=2), BIASED),
    ],
    ids=str,
)
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(sizes, experts):
    config = tiny_config(experts=experts)
    placed, found, expected = loss_and_gradients(config, sizes, batch())
    held = placed["layers"]["mlp"]["up"]["kernel"].addressable_shards[0].data
    assert held.shape[1] == 4 // sizes["expert"]
    if experts is SHARED:
        shared = placed["layers"]["mlp"]["shared"]["up"]["kernel"].addressable_shards[0].data
        assert shared.shape[1:] == (config.hidden_size // sizes["fsdp"], 24 // sizes.get("tensor", 1))
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("sizes", "count", "width", "shape"),
    [
        (dict(expert=4, fsdp=1, tensor=2), 6, 48, (8, 16)),
        (dict(expert=2, fsdp=1, tensor=4), 4, 50, (8, 16)),
        (dict(expert=4, fsdp=1, tensor=2), 6, 49, (8, 16)),
        (dict(expert=2, fsdp=1, context=4), 4, 48, (3, 18)),
    ],
    ids=["experts", "width", "both", "rows and tokens"],
)
def test_what_does_not_divide_stays_whole(sizes, count, width, shape):
    config = tiny_config(experts=dataclasses.replace(BIASED, count=count), intermediate_size=width, num_layers=1)
    _, found, expected = loss_and_gradients(config, sizes, batch(*shape))
    assert_same(found, expected)


@pytest.mark.parametrize("width", [48, 64])
def test_scales_of_frozen_experts_that_do_not_divide_stay_whole_with_them(width):
    """48 inputs have 3 scales in NF4, 64 have one."""
    config = tiny_config(experts=EXPERTS, intermediate_size=width, num_layers=1)
    network, precision = abstract_decoder(config), Precision(compute="float32", frozen_kernels="nf4")
    inputs, found = jnp.asarray(batch()["inputs"]), []
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1])[None], inputs.shape)
    for mesh in (make_mesh(jax.devices()[:1]), make_mesh(shape=MeshShape(expert=2, tensor=2, fsdp=2))):
        where = flatten(shardings(network.logical_axes, network.shapes, mesh))
        _, frozen = place_weights(random_weights(config), lambda path: False, precision, where)
        with jax.set_mesh(mesh):
            hidden = jax.jit(lambda weights: apply(network, weights, inputs, positions, None, compute_dtype="float32"))
            found.append(np.asarray(hidden(frozen)))
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)


def test_the_balance_of_what_is_no_padding_is_in_the_loss_once_a_token_that_is_learnt():
    config, given = tiny_config(experts=EXPERTS), batch(2)
    given["segment_ids"][:, 10:] = 0
    given["weights"][:, 5:] = 0
    without = dataclasses.replace(config, experts=dataclasses.replace(EXPERTS, balance_coefficient=0.0))

    @jax.jit
    def totals(weights, batch):
        either = [
            make_loss(abstract_decoder(each), jnp.dtype("float32"), lambda path: True, ("text",))(weights, batch)[0]
            for each in (config, without)
        ]
        arguments = (batch[name] for name in ("inputs", "positions", "segment_ids"))
        real = (batch["segment_ids"] > 0).astype(jnp.float32)
        balance = apply_with_balance(abstract_decoder(config), weights, *arguments, real, compute_dtype="float32")[1]
        return *either, balance

    total, plain, balance = totals(weights_on_device(random_weights(config)), given)
    assert balance > 1
    assert total - plain == pytest.approx(0.1 * float(balance) * 2 * 5, rel=1e-3)


def test_the_balance_has_a_gradient_that_takes_the_router_to_an_even_load():
    config, given = tiny_config(experts=EXPERTS, num_layers=1), batch(2)
    flat = flatten(weights_on_device(random_weights(config)))

    @jax.jit
    @jax.value_and_grad
    def balance(router):
        weights = unflatten(flat | {"layers/mlp/router": router})
        arguments = (jnp.asarray(given[name]) for name in ("inputs", "positions", "segment_ids"))
        counted = jnp.ones((2, 16))
        return apply_with_balance(abstract_decoder(config), weights, *arguments, counted, compute_dtype="float32")[1]

    before, gradient = balance(flat["layers/mlp/router"])
    after, _ = balance(flat["layers/mlp/router"] - 0.1 * gradient / jnp.linalg.norm(gradient))
    assert after < before


@pytest.mark.parametrize("experts", [SHARED, BIASED], ids=["shared", "biased"])
def test_adapters_of_experts_merge(experts):
    config = tiny_config(experts=experts)
    weights = random_weights(config, lora=LORA)
    tokens = jnp.asarray(batch()["inputs"])
    arguments = (tokens, jnp.broadcast_to(jnp.arange(16)[None], tokens.shape), jnp.ones_like(tokens))
    merged = jax.tree.map(np.asarray, merge_lora(weights, LORA))
    adapted = apply(abstract_decoder(config, LORA), weights_on_device(weights), *arguments, compute_dtype="float32")
    found = apply(abstract_decoder(config), weights_on_device(merged), *arguments, compute_dtype="float32")
    np.testing.assert_allclose(found, adapted, atol=1e-4)


def weights_on_device(weights: dict) -> dict:
    return jax.tree.map(jnp.asarray, weights)


def test_an_even_load_costs_the_number_of_experts_a_token():
    even = Balance(jnp.full((3, 4), 10.0 * 2 / 4), jnp.full((3, 4), 10.0 / 4))
    np.testing.assert_allclose(load_balancing_loss(even, jnp.float32(10)), 2.0)
    all_to_one = Balance(jnp.array([[10.0, 0, 0, 0]]), jnp.array([[10.0, 0, 0, 0]]))
    np.testing.assert_allclose(load_balancing_loss(all_to_one, jnp.float32(10)), 4.0)
    # Where nothing is counted.
    assert load_balancing_loss(jax.tree.map(jnp.zeros_like, even), jnp.float32(0)) == 0


def test_a_token_goes_through_one_expert_at_least_and_all_at_most():
    others = dict(renormalise=True, balance_coefficient=0.1)
    assert [ExpertsConfig(count=4, per_token=number, **others).per_token for number in (1, 4)] == [1, 4]
    for number in (0, 5):
        with pytest.raises(UserError, match=f"num_experts_per_tok {number} is not between 1 and the 4 experts"):
            ExpertsConfig(count=4, per_token=number, **others)
