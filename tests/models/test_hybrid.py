"""Layers that mix tokens in different ways: however they are compiled, cut and grouped, the model is the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import random_weights, tiny_config
from method_inputs import TOKENS, forward, trained

from cpt_jax.adapt import ByPath, Expand, LoRA
from cpt_jax.core.precision import FLOAT32, Precision
from cpt_jax.core.tree import flatten, unflatten
from cpt_jax.models.config import LayerKind
from cpt_jax.models.decoder import abstract_decoder, apply
from cpt_jax.models.delta_net import DeltaNetConfig
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.generate import generate
from cpt_jax.models.kernels.visible import document_begins
from cpt_jax.models.latent_attention import LatentAttentionConfig
from cpt_jax.models.layer_groups import join_layers, split_layers, with_copies
from cpt_jax.models.linear import LoRAConfig
from cpt_jax.models.mamba2 import Mamba2Config
from cpt_jax.models.quantised import dense, quantise
from cpt_jax.models.remat import Remat
from cpt_jax.models.rope import Rope
from cpt_jax.models.short_conv import ShortConvConfig
from cpt_jax.optim.groups import stacked_axes
from cpt_jax.recipe.model import Model
from cpt_jax.sharding.mesh import MeshShape, make_mesh
from cpt_jax.sharding.placement import place
from cpt_jax.sharding.rules import shardings

KINDS = (
    LayerKind(rope=None, mixer=DeltaNetConfig(key_heads=2, value_heads=4, key_dim=8, value_dim=16, kernel_size=4)),
    LayerKind(rope=Rope(theta=1e4, dim=8)),
    LayerKind(rope=None, mixer=ShortConvConfig(kernel_size=3)),
    LayerKind(rope=None, mixer=Mamba2Config(heads=4, groups=2, head_dim=16, state_size=8, kernel_size=4)),
    LayerKind(
        rope=Rope(theta=1e4, dim=6),
        mixer=LatentAttentionConfig(query_rank=12, rank=10, fixed_dim=4, rotated_dim=6, value_dim=8),
    ),
)
# Two periods; no period.
PATTERNS = {"periodic": (0, 1, 2, 3, 4) * 2, "not periodic": (0, 0, 1, 2)}
LORA = LoRAConfig(rank=3, alpha=6.0, targets=("layers/*",))
ROWS = np.stack([np.repeat([1, 2, 3], [70, 50, 8]), np.repeat([0, 1], [30, 98])] * 4)


def hybrid(pattern="periodic", **changes):
    layers = PATTERNS[pattern]
    kinds = dict(
        layer_kinds=KINDS[: max(layers) + 1], layer_pattern=layers, num_layers=len(layers), attention_gate="channel"
    )
    return tiny_config(**kinds | dict(qk_norm="head", attention="xla") | changes)


# One period.
MIXTURE = hybrid(
    layer_kinds=KINDS[:2],
    layer_pattern=(0, 1),
    num_layers=2,
    experts=ExpertsConfig(count=4, per_token=2, renormalise=True, balance_coefficient=0.1, shared_intermediate_size=24),
)


def number_of(config, lora=None):
    """What makes a number of weights, by all hidden states of packed rows."""
    segments = jnp.asarray(ROWS)
    tokens = jax.random.randint(jax.random.key(0), segments.shape, 3, 320)
    positions = jnp.arange(segments.shape[1])[None] - document_begins(segments)
    network = abstract_decoder(config, lora)

    def summed(weights):
        hidden = apply(network, weights, tokens, positions, segments, compute_dtype="float32")
        return (hidden**2 * jnp.cos(jnp.arange(32.0))[None, None]).sum()

    return summed


def value_and_gradients(config, weights, lora=None):
    return jax.jit(jax.value_and_grad(number_of(config, lora)))(weights)


@functools.cache
def expected(pattern):
    return value_and_gradients(hybrid(pattern), jax.tree.map(jnp.asarray, random_weights(hybrid(pattern))))


def assert_close(found, right):
    value, gradients = right
    np.testing.assert_allclose(found[0], value, rtol=1e-4)
    for path, leaf in flatten(found[1]).items():
        right = np.asarray(flatten(gradients)[path])
        assert np.linalg.norm(np.asarray(leaf) - right) <= 2e-3 * np.linalg.norm(right), path


def on_mesh(config, sizes, lora=None, run=value_and_gradients):
    """The same, on a mesh of these sizes."""
    network, mesh = abstract_decoder(config, lora), make_mesh(shape=MeshShape(**sizes))
    where = shardings(network.logical_axes, network.shapes, mesh)
    placed = jax.tree.map(lambda leaf, there: place(leaf, leaf.dtype, there), random_weights(config, lora=lora), where)
    with jax.set_mesh(mesh):
        return run(config, placed, lora)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("remat", [None, Remat(), Remat(products=True, keep=("attention_out",))], ids=str)
def test_in_a_loop_or_one_by_one_and_recomputed_the_model_is_the_same(pattern, remat):
    weights = jax.tree.map(jnp.asarray, random_weights(hybrid(pattern)))
    loop = "scan" if remat is not None and remat.products else "unroll"
    assert_close(value_and_gradients(hybrid(pattern, layer_loop=loop, remat=remat), weights), expected(pattern))


@pytest.mark.parametrize("sizes", [dict(fsdp=4, tensor=2), dict(replica=2, tensor=4), dict(fsdp=2, context=4)], ids=str)
def test_on_a_mesh_the_model_is_the_same(sizes):
    assert_close(on_mesh(hybrid(), sizes), expected("periodic"))


@functools.cache
def expected_of_experts():
    return value_and_gradients(MIXTURE, jax.tree.map(jnp.asarray, random_weights(MIXTURE, lora=LORA)), LORA)


@pytest.mark.parametrize("sizes", [dict(expert=4, fsdp=2), dict(expert=2, fsdp=2, tensor=2)], ids=str)
def test_on_a_mesh_its_experts_are_the_same(sizes):
    assert_close(on_mesh(MIXTURE, sizes, LORA), expected_of_experts())


def test_its_experts_may_be_quantised():
    def value(config, weights, lora, back=lambda kernel: kernel):
        flat = flatten(weights)
        for name in ("gate", "up", "down"):
            path = f"layers/mlp/{name}/kernel"
            flat[path] = back(jax.jit(quantise, static_argnums=1)(flat[path], "int8"))
        return jax.jit(number_of(config, lora))(unflatten(flat))

    weights = jax.tree.map(jnp.asarray, random_weights(MIXTURE, lora=LORA))
    expected = value(MIXTURE, weights, LORA, lambda kernel: dense(kernel, jnp.dtype("float32")))
    np.testing.assert_allclose(value(MIXTURE, weights, LORA), expected, rtol=1e-4)
    np.testing.assert_allclose(on_mesh(MIXTURE, dict(expert=2, fsdp=2, tensor=2), LORA, value), expected, rtol=1e-4)


def test_stacks_hold_the_layers_that_have_them():
    config = hybrid("not periodic")
    shapes = {path: leaf.shape[0] for path, leaf in flatten(abstract_decoder(config).shapes).items()}
    assert {shapes[f"layers/{name}/o/kernel"] for name in ("attention", "short_conv")} == {1}
    assert shapes["layers/delta_net/o/kernel"] == 2
    assert shapes["layers/mlp/down/kernel"] == shapes["layers/attention_norm/scale"] == 4
    assert config.layers_with("delta_net/a_log") == (0, 1)
    assert config.layers_with("mlp/up/kernel") == (0, 1, 2, 3)


@pytest.mark.parametrize("method", [ByPath(patterns=("layers/*",), layers=(1, 3)), LoRA(rank=3, alpha=6.0)], ids=str)
def test_what_trains_in_some_layers_goes_back_into_the_whole_stacks(method):
    config = hybrid("not periodic")
    base = Model(config=config, weights=random_weights(config), hf_config={})
    adapted = base.adapted(method, seed=0)
    assert flatten(adapted.network.shapes).keys() == flatten(adapted.weights).keys()
    np.testing.assert_array_equal(forward(adapted), forward(base))
    moved = trained(adapted, method)
    merged = moved.merged()
    assert np.abs(forward(moved) - forward(base)).max() > 0.01
    np.testing.assert_allclose(forward(merged), forward(moved), atol=1e-4)
    if isinstance(method, ByPath):
        before, after = flatten(base.weights), flatten(merged.weights)
        trains = {"layers/delta_net/q/kernel": [1], "layers/attention/q/kernel": [0], "layers/mlp/up/kernel": [1, 2]}
        for path, layers in trains.items():
            changed = [n for n, one in enumerate(before[path]) if (np.asarray(after[path][n]) != np.asarray(one)).any()]
            assert changed == layers, path
        np.testing.assert_array_equal(
            np.asarray(after["layers/short_conv/q/kernel"]), before["layers/short_conv/q/kernel"]
        )


def test_generation_by_groups_of_layers_is_that_of_whole_stacks():
    """Each group has its own layers' part of each cache, also none of some."""
    config = hybrid("not periodic")
    base = Model(config=config, weights=random_weights(config), hf_config={})
    grouped = base.adapted(ByPath(patterns=("layers/*",), layers=(1, 3)), seed=0)
    prompts = [TOKENS[0, :3].tolist(), TOKENS[1, :17].tolist()]
    expected, found = (
        generate(model.network, model.on_device(FLOAT32), prompts, new_tokens=20) for model in (base, grouped)
    )
    assert found == expected


def test_added_blocks_are_copies_that_change_nothing_yet():
    config, method = hybrid("not periodic"), Expand(blocks=2)
    weights = random_weights(config)
    deeper = method.layout(config)
    # A copy of the second linear attention and of the convolution.
    assert [kind.mixer_name for kind in deeper.kind_of_layer] == [
        *("delta_net", "delta_net", "delta_net", "attention", "short_conv", "short_conv")
    ]
    copied = split_layers(with_copies(weights, config, method.order(4)), deeper)
    flat = flatten(copied)
    assert not np.asarray(flat["layers/added_0/delta_net/o/kernel"]).any()
    assert not np.asarray(flat["layers/added_1/mlp/down/kernel"]).any()
    np.testing.assert_array_equal(
        np.asarray(flat["layers/added_0/delta_net/q/kernel"])[0], weights["layers"]["delta_net"]["q"]["kernel"][1]
    )
    network = abstract_decoder(deeper)
    assert {path: leaf.shape for path, leaf in flat.items()} == {
        path: leaf.shape for path, leaf in flatten(network.shapes).items()
    }
    one, other = (Model(config=c, weights=w, hf_config={}) for c, w in ((config, weights), (deeper, copied)))
    np.testing.assert_allclose(forward(other, tokens=TOKENS), forward(one, tokens=TOKENS), atol=1e-5)
    joined = flatten(join_layers(copied, deeper.layer_groups))
    assert joined["layers/delta_net/q/kernel"].shape[0] == 3


@pytest.mark.parametrize(
    "path",
    [
        *("delta_net/a_log", "mamba2/a_log", "mamba2/step_bias", "mamba2/skip"),
        *("attention/sinks", "mlp/router_bias"),
    ],
)
def test_rates_of_decay_and_scores_are_vectors_that_stay_float32(path):
    """exp(a_log) in bfloat16 would be another rate; an optimizer that looks at matrices looks at each layer's alone."""
    assert Precision(compute="bfloat16").dtype_of(f"layers/{path}") == jnp.float32
    assert stacked_axes(f"layers/{path}", 2) == 1
