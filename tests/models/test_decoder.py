"""The decoder against transformers, and what must hold whatever its sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import hf_config, random_weights, tiny_config

from cpt_jax.checkpoint.hf_write import save
from cpt_jax.core.tree import flatten
from cpt_jax.models.decoder import abstract_decoder, apply, logits
from cpt_jax.models.linear import LoRAConfig, merge_lora
from cpt_jax.models.remat import Remat

CONFIGS = {
    "tied": {},
    "untied": dict(tie_word_embeddings=False),
    "head dimension other than width / heads": dict(head_dim=16, num_kv_heads=1),
    "no grouping, other epsilon": dict(num_kv_heads=4, norm_epsilon=1e-6),
}


def run(config, weights, tokens, positions=None, segments=None, dtype="float32", lora=None):
    network = abstract_decoder(config, lora)
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape) if positions is None else positions
    segments = jnp.ones_like(tokens) if segments is None else segments

    @jax.jit
    def forward(weights, tokens, positions, segments):
        hidden = apply(network, weights, tokens, positions, segments, compute_dtype=dtype)
        return logits(network, weights, hidden, compute_dtype=dtype)

    return np.asarray(forward(weights, tokens, jnp.asarray(positions), jnp.asarray(segments)))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_gradients_are_those_of_transformers(changes, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(**changes)
    weights = random_weights(config)
    save(tmp_path / "model", config, weights, hf_config(config), tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40))
    expected = reference(torch.tensor(tokens)).logits
    np.testing.assert_allclose(run(config, weights, tokens), expected.detach().numpy(), atol=1e-4)

    expected.logsumexp(-1).sum().backward()
    network = abstract_decoder(config)

    def summed(weights):
        segments = jnp.ones(tokens.shape, jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(40)[None], tokens.shape)
        hidden = apply(network, weights, jnp.asarray(tokens), positions, segments, compute_dtype="float32")
        return jax.nn.logsumexp(logits(network, weights, hidden, compute_dtype="float32"), -1).sum()

    ours = jax.jit(jax.grad(summed))(jax.tree.map(jnp.asarray, weights))
    theirs = dict(reference.named_parameters())
    pairs = [
        (ours["layers"]["attention"]["k"]["kernel"][0].T, theirs["model.layers.0.self_attn.k_proj.weight"]),
        (ours["layers"]["mlp"]["down"]["kernel"][1].T, theirs["model.layers.1.mlp.down_proj.weight"]),
        (ours["layers"]["attention_norm"]["scale"][1], theirs["model.layers.1.input_layernorm.weight"]),
        (ours["embed"]["base"], theirs["model.embed_tokens.weight"]),
    ]
    for mine, reference_weight in pairs:
        gradient = reference_weight.grad.numpy()
        np.testing.assert_allclose(mine, gradient, rtol=1e-3, atol=1e-3 * np.abs(gradient).max())


def test_packed_documents_give_the_logits_of_each_alone():
    config = tiny_config()
    weights = random_weights(config)
    generator = np.random.default_rng(1)
    documents = [generator.integers(0, 320, size) for size in (11, 5, 16)]
    packed = np.concatenate(documents)[None]
    positions = np.concatenate([np.arange(len(d)) for d in documents])[None]
    segments = np.concatenate([np.full(len(d), i + 1) for i, d in enumerate(documents)])[None]
    together = run(config, weights, packed, positions, segments)[0]
    first = 0
    for document in documents:
        alone = run(config, weights, document[None])[0]
        np.testing.assert_allclose(together[first : first + len(document)], alone, atol=1e-5)
        first += len(document)


def test_a_later_token_has_no_influence():
    config = tiny_config()
    network, weights = abstract_decoder(config), jax.tree.map(jnp.asarray, random_weights(config))
    tokens = jnp.arange(12)[None] + 3

    def at_five(table):
        hidden = apply(
            network,
            weights | {"embed": {"base": table}},
            tokens,
            jnp.arange(12)[None],
            jnp.ones_like(tokens),
            compute_dtype="float32",
        )
        return hidden[0, 5].sum()

    gradient = jax.grad(at_five)(weights["embed"]["base"])
    assert np.abs(gradient[3 + 5]).max() > 0
    np.testing.assert_array_equal(gradient[3 + 6 : 3 + 12], 0)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_one_table_with_the_base(tied):
    whole = tiny_config(tie_word_embeddings=tied)
    weights = random_weights(whole)
    split = tiny_config(tie_word_embeddings=tied, vocab_size=300, new_rows=20)
    flat = flatten(weights)
    parts = {**weights, "embed": {"base": flat["embed/base"][:300], "new": flat["embed/base"][300:]}}
    if not tied:
        parts["head"] = {"base": flat["head/base"][:300], "new": flat["head/base"][300:]}
    tokens = np.random.default_rng(0).integers(0, 320, (2, 20))
    # The first and the last of either.
    tokens[0, :4] = 0, 299, 300, 319
    np.testing.assert_allclose(run(split, parts, tokens), run(whole, weights, tokens), atol=1e-5)


def test_attaching_lora_changes_nothing_and_merging_it_changes_nothing():
    lora = LoRAConfig(rank=4, alpha=8)
    config = tiny_config()
    tokens = np.random.default_rng(0).integers(0, 320, (2, 20))
    plain = random_weights(config)
    adapted = flatten(jax.tree.map(np.asarray, random_weights(config, lora=lora)))
    from cpt_jax.core.tree import unflatten

    fresh = {
        path: np.zeros_like(leaf) if path.endswith("lora_b") else leaf for path, leaf in adapted.items()
    } | flatten(plain)
    np.testing.assert_array_equal(run(config, unflatten(fresh), tokens, lora=lora), run(config, plain, tokens))
    trained = unflatten(adapted | flatten(plain))
    moved = run(config, trained, tokens, lora=lora)
    assert np.abs(moved - run(config, plain, tokens)).max() > 0.1
    np.testing.assert_allclose(
        run(config, jax.tree.map(np.asarray, merge_lora(trained, lora)), tokens), moved, atol=1e-4
    )


def test_scan_and_unroll_and_remat_are_the_same():
    weights = random_weights(tiny_config())
    tokens = np.random.default_rng(0).integers(0, 320, (2, 20))
    expected = run(tiny_config(), weights, tokens)
    for changes in (dict(layer_loop="unroll"), dict(remat=Remat())):
        np.testing.assert_allclose(run(tiny_config(**changes), weights, tokens), expected, atol=1e-5)


def test_every_weight_names_its_axes():
    network = abstract_decoder(tiny_config(new_rows=5, tie_word_embeddings=False), LoRAConfig(rank=2, alpha=4))
    shapes, axes = flatten(network.shapes), flatten(network.logical_axes)
    assert shapes.keys() == axes.keys()
    for path, shape in shapes.items():
        assert len(axes[path]) == len(shape.shape), path
