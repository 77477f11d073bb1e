"""Blocks that are added: nothing changes at first, little by the first step, and all that is theirs learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import random_weights, tiny_config
from method_inputs import EXPERTS, TOKENS, arrays, forward, model_of

from cpt_jax.adapt import Expand
from cpt_jax.core.tree import combine, flatten, partition
from cpt_jax.models.config import LayerKind
from cpt_jax.models.layer_groups import split_layers, with_copies
from cpt_jax.models.lone_feed_forward import LoneExpertsConfig
from cpt_jax.models.mamba2 import Mamba2Config
from cpt_jax.models.rope import Rope
from cpt_jax.models.short_conv import ShortConvConfig
from cpt_jax.models.side_by_side import SideBySideConfig
from cpt_jax.recipe.model import Model
from cpt_jax.training.loss import make_loss

METHOD = Expand(blocks=1)
ROPE = Rope(theta=1e4, dim=8)
MAMBA2 = Mamba2Config(heads=4, groups=2, head_dim=16, state_size=8, kernel_size=4)
MIXED = dict(
    layer_kinds=(
        LayerKind(rope=None, mixer=ShortConvConfig(kernel_size=3)),
        LayerKind(rope=ROPE, mixer=SideBySideConfig(mamba2=MAMBA2)),
    ),
    layer_pattern=(0, 1),
)
EVERY = {
    "norms before": tiny_config(),
    "norms behind": tiny_config(norm_placement="after", norm_offset=1.0),
    "layer norms behind too": tiny_config(norm_placement="both", norm="layer"),
    "experts beside a feed-forward": tiny_config(
        norm_placement="both", experts=dataclasses.replace(EXPERTS, beside=True, intermediate_size=24)
    ),
    "of other kinds": tiny_config(**MIXED),
    "of other kinds, norms behind too": tiny_config(norm_placement="both", **MIXED),
    "experts alone, in a smaller space": tiny_config(
        layer_kinds=(LayerKind(rope=ROPE), LayerKind(rope=None, mixer=LoneExpertsConfig())),
        layer_pattern=(0, 1),
        feed_forward=False,
        experts=dataclasses.replace(
            EXPERTS, latent_size=16, shared_intermediate_size=24, shared_gate=False, intermediate_size=24
        ),
    ),
}


def deeper(config) -> Model:
    layout, weights = METHOD.layout(config), random_weights(config)
    copied = split_layers(with_copies(weights, config, METHOD.order(config.num_layers)), layout)
    return Model(config=layout, weights=copied, hf_config={})


@pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
def test_nothing_changes_and_little_by_the_first_step_and_all_that_is_added_learns(config):
    model = deeper(config)
    base = Model(config=config, weights=random_weights(config), hf_config={})
    np.testing.assert_array_equal(forward(model), forward(base))

    tokens = jnp.asarray(TOKENS, jnp.int32)
    ones = jnp.ones_like(tokens[:, 1:])
    batch = dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=ones, domains=0 * ones)
    batch |= dict(positions=jnp.broadcast_to(jnp.arange(ones.shape[1])[None], ones.shape), weights=1.0 * ones)
    loss = make_loss(model.network, jnp.dtype("float32"), METHOD.trains, ("text",))
    trained, frozen = partition(arrays(model.weights), METHOD.trains)
    mean = jax.jit(
        jax.value_and_grad(lambda trained: loss(combine(trained, frozen), batch)[0] / batch["weights"].sum())
    )
    before, gradient = mean(trained)
    # Adam's first step, whatever the gradients' size.
    moved = jax.tree.map(lambda weight, slope: weight - 1e-3 * jnp.sign(slope), trained, gradient)
    after, gradient = mean(moved)
    assert before - 0.3 < after < before
    still = [path for path, slope in flatten(gradient).items() if not jnp.any(slope)]
    assert not still


@pytest.mark.parametrize(("placement", "offset"), [("before", 0.0), ("both", 1.0), ("after", 0.0)])
def test_an_added_block_is_a_copy_behind_its_original_that_adds_nothing_yet(placement, offset):
    base = model_of(tiny_config(num_layers=4, norm_placement=placement, norm_offset=offset))
    given, grown = flatten(base.weights), flatten(base.adapted(Expand(blocks=2), 0).weights)
    last = ("attention/o/", "mlp/down/") if placement == "before" else ("attention_out_norm/", "mlp_out_norm/")
    for path in (path for path in given if path.startswith("layers/")):
        inner = path.removeprefix("layers/")
        for number, layers in enumerate((slice(0, 2), slice(2, 4))):
            original = np.asarray(given[path][layers])
            expected = np.full_like(original[1:], -offset) if inner.startswith(last) else original[1:]
            np.testing.assert_array_equal(grown[f"layers/kept_{number}/{inner}"], original)
            np.testing.assert_array_equal(grown[f"layers/added_{number}/{inner}"], expected)
