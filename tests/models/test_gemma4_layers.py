"""Layers that take keys and values of others, layers with inputs of their own, and experts beside a feed-forward: however
they are compiled, cut and grouped, the model is the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import random_weights, tiny_config
from method_inputs import TOKENS, forward, trained
from models.test_hybrid import assert_close, on_mesh, value_and_gradients

from cpt_jax.adapt import ByPath, Embeddings, Expand, LoRA
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import FLOAT32
from cpt_jax.core.tree import flatten
from cpt_jax.models.attention import GlobalAttention
from cpt_jax.models.config import LayerKind
from cpt_jax.models.cut_vocabulary import looked_up
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.generate import generate
from cpt_jax.models.remat import Remat
from cpt_jax.models.rope import Rope
from cpt_jax.recipe.model import Model

KINDS = (
    LayerKind(rope=Rope(theta=1e4, dim=8), window=20),
    LayerKind(rope=Rope(theta=1e6, dim=16), mixer=GlobalAttention(head_dim=16, num_kv_heads=1)),
)


def sharing(**changes):
    """Two periods with keys and values, one without; the last rows of both tables are new ones."""
    kinds = dict(layer_kinds=KINDS, layer_pattern=(0, 1) * 3, num_layers=6, sharing_layers=2)
    inputs = dict(layer_input_size=8, sharing_intermediate_size=96, vocab_size=310, new_rows=10)
    return tiny_config(**kinds | inputs | dict(qk_norm="head", norm_placement="both", attention="xla") | changes)


@functools.cache
def expected():
    return value_and_gradients(sharing(), jax.tree.map(jnp.asarray, random_weights(sharing())))


@pytest.mark.parametrize("changes", [dict(layer_loop="unroll"), dict(remat=Remat(products=True))], ids=str)
def test_one_by_one_and_recomputed_the_model_is_the_same(changes):
    weights = jax.tree.map(jnp.asarray, random_weights(sharing()))
    assert_close(value_and_gradients(sharing(**changes), weights), expected())


def test_on_a_mesh_experts_beside_a_feed_forward_are_the_same():
    experts = ExpertsConfig(
        count=4, per_token=2, renormalise=True, balance_coefficient=0.0, intermediate_size=24, beside=True
    )
    config = tiny_config(experts=experts, norm_placement="both", attention="xla")
    right = value_and_gradients(config, jax.tree.map(jnp.asarray, random_weights(config)))
    assert flatten(right[1])["layers/experts/expert_scale"].any()
    assert_close(on_mesh(config, dict(expert=2, fsdp=2, tensor=2)), right)


@pytest.mark.parametrize("sizes", [dict(fsdp=4, tensor=2), dict(fsdp=2, context=4)], ids=str)
def test_on_a_mesh_the_model_is_the_same(sizes):
    assert_close(on_mesh(sharing(), sizes), expected())


def test_stacks_hold_the_layers_that_have_them():
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_decoder(sharing()).shapes).items()}
    of_sharing = {path.removeprefix("layers/sharing/") for path in shapes if path.startswith("layers/sharing/")}
    assert {path for path in of_sharing if "attention/" in path} == {
        f"{mixer}/{name}"
        for mixer in ("attention", "global_attention")
        for name in ("q/kernel", "o/kernel", "q_norm/scale")
    }
    assert shapes["layers/attention/k/kernel"][0] == 2
    assert shapes["layers/mlp/up/kernel"] == (4, 32, 48)
    assert shapes["layers/sharing/mlp/up/kernel"] == (2, 32, 96)
    assert sharing().layers_with("sharing/global_attention/q/kernel") == (5,)
    assert sharing().layers_with("global_attention/q/kernel") == (1, 3)


def test_by_groups_of_layers_the_model_is_the_same():
    """Training some of them, of which one shares, and in generation, where each group has its own part of each cache."""
    base, method = model(), ByPath(patterns=("layers/*",), layers=(1, 5))
    grouped = base.adapted(method, seed=0)
    np.testing.assert_array_equal(forward(grouped), forward(base))
    moved = trained(grouped, method)
    np.testing.assert_allclose(forward(moved.merged()), forward(moved), atol=1e-4)
    assert np.abs(forward(moved) - forward(base)).max() > 0.01
    prompts = [TOKENS[0, :3].tolist(), TOKENS[1, :17].tolist()]
    expected, found = (
        generate(each.network, each.on_device(FLOAT32), prompts, new_tokens=20) for each in (moved.merged(), moved)
    )
    assert found == expected


def model() -> Model:
    return Model(config=sharing(), weights=random_weights(sharing()), hf_config={})


def test_new_rows_of_both_tables_train_by_every_method_that_trains_new_rows():
    paths = flatten(abstract_decoder(sharing()).shapes)
    for method in (Embeddings(), LoRA()):
        assert {path for path in paths if method.trains(path)} == {"embed/new", "layer_embed/new"}
    tables = {f"{table}/{part}" for table in ("embed", "layer_embed") for part in ("base", "new")}
    assert {path for path in paths if Embeddings(rows="all").trains(path)} == tables


def test_rows_that_are_padding_and_copies_of_blocks():
    padded = model().padded(64)
    assert {path: leaf.shape for path, leaf in flatten(padded.weights).items() if "embed" in path} == {
        "embed/base": (320, 32),
        "embed/new": (64, 32),
        "layer_embed/base": (320, 48),
        "layer_embed/new": (64, 48),
    }
    np.testing.assert_allclose(forward(padded), forward(model()), atol=1e-5)
    with pytest.raises(UserError, match="Expand: this model's layers take keys and values of others"):
        model().adapted(Expand(blocks=1), seed=0)


def test_rows_of_a_large_table_and_their_gradient_are_those_of_any():
    table, tokens = (
        jax.random.normal(jax.random.key(0), (50, 8)).astype(jnp.bfloat16),
        jnp.asarray([[1, 2, 2], [7, 49, 1]]),
    )

    def summed(table, large):
        rows = looked_up(table, tokens, 0, large=large)
        return (rows.astype(jnp.float32) * jnp.arange(48.0).reshape(rows.shape)).sum(), rows

    found, expected = (jax.grad(summed, has_aux=True)(table, large) for large in (True, False))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
