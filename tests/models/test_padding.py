"""Padded vocabulary rows: a model with them is the model without them, whatever they hold, and they are not saved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import english, hf_config, random_weights, tiny_config, write_tokenizer

from cpt_jax.checkpoint.hf import load
from cpt_jax.checkpoint.hf_write import save
from cpt_jax.core.precision import Precision
from cpt_jax.core.tree import flatten, partition, unflatten
from cpt_jax.evaluate.bits_per_byte import bits_per_byte, pack_documents
from cpt_jax.models.cross_entropy import TableUse, token_losses
from cpt_jax.models.decoder import apply, logits
from cpt_jax.models.generate import generate
from cpt_jax.recipe.model import Model
from cpt_jax.training.loss import make_loss
from cpt_jax.vocab.tokenizer import Tokenizer

FLOAT32 = Precision(compute="float32")
CONFIGS = {
    "tied": dict(vocab_size=313, new_rows=7),
    "untied": dict(vocab_size=313, new_rows=7, tie_word_embeddings=False),
    "no new rows, untied": dict(vocab_size=320, tie_word_embeddings=False),
}
# Rows of the padded tables of 313, 320 and 7 tokens.
MULTIPLE = 64


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def plain(request) -> Model:
    config = tiny_config(**request.param)
    return Model(config=config, weights=random_weights(config), hf_config=hf_config(config))


def with_loud_padding(model: Model) -> Model:
    """The padded model with padding that every token would be, were it one: ten times each row's size."""
    padded, flat = model.padded(MULTIPLE), {}
    for path, leaf in flatten(padded.weights).items():
        flat[path] = np.array(leaf)
        if path.split("/")[0] in ("embed", "head"):
            rows = padded.config.table_rows[path.split("/")[1]]
            generator = np.random.default_rng(1)
            flat[path][rows:] = generator.normal(0, 3, (len(leaf) - rows, leaf.shape[1]))
    return dataclasses.replace(padded, weights=unflatten(flat))


def batch(model: Model) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, model.config.total_rows, (2, 33))
    # The first and last tokens of each table, beside the padding.
    tokens[0, :6] = [0, model.config.vocab_size - 1, model.config.vocab_size % model.config.total_rows, 5, 6, 7]
    tokens[1, -1] = model.config.total_rows - 1
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.arange(32), (2, 32)),
        "segment_ids": np.ones((2, 32), np.int32),
        "domains": np.zeros((2, 32), np.int32),
        "weights": np.ones((2, 32), np.float32),
    }


def test_tables_have_a_multiple_of_rows_and_every_token_its_own(plain):
    padded = plain.padded(MULTIPLE)
    assert flatten(padded.weights).keys() == flatten(plain.weights).keys()
    assert padded.config.total_rows == plain.config.total_rows
    for path, leaf in flatten(padded.weights).items():
        assert leaf.shape == flatten(padded.network.shapes)[path].shape
        if path.split("/")[0] in ("embed", "head"):
            rows = plain.config.table_rows[path.split("/")[1]]
            assert leaf.shape[0] == -(-rows // MULTIPLE) * MULTIPLE >= rows
            np.testing.assert_array_equal(leaf[:rows], flatten(plain.weights)[path])
            np.testing.assert_array_equal(leaf[rows:], 0)
        else:
            np.testing.assert_array_equal(leaf, flatten(plain.weights)[path])


def test_padding_once_more_takes_the_old_padding_off(plain):
    again, once = with_loud_padding(plain).padded(48), plain.padded(48)
    for path, leaf in flatten(once.weights).items():
        np.testing.assert_array_equal(flatten(again.weights)[path], leaf)


def test_logits_are_one_a_token_and_those_of_the_model_without(plain):
    inputs = batch(plain)

    def forward(model):
        arrays = [jnp.asarray(inputs[name]) for name in ("inputs", "positions", "segment_ids")]
        weights = model.on_device(FLOAT32)
        hidden = apply(model.network, weights, *arrays, compute_dtype="float32")
        return logits(model.network, weights, hidden, compute_dtype="float32")

    expected, got = forward(plain), forward(with_loud_padding(plain))
    assert got.shape == expected.shape == (2, 32, plain.config.total_rows)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_greedy_text_is_that_of_the_model_without(plain):
    padded = with_loud_padding(plain)
    prompts = [[3], list(range(50, 90))]
    expected = generate(plain.network, plain.on_device(FLOAT32), prompts, new_tokens=20)
    assert generate(padded.network, padded.on_device(FLOAT32), prompts, new_tokens=20) == expected
    assert max(map(max, expected)) < plain.config.total_rows


@pytest.mark.parametrize("trains", ["all", "new rows"])
def test_losses_and_gradients_are_those_of_the_model_without_and_padding_has_none(plain, trains):
    wanted = (lambda path: True) if trains == "all" else lambda path: path.endswith("/new")
    if trains == "new rows" and not plain.config.new_rows:
        wanted = lambda path: path.endswith("/base")  # noqa: E731
    inputs = batch(plain)

    def differentiated(model):
        loss = make_loss(model.network, "float32", wanted, ("text",))
        trainable, frozen = partition(model.on_device(FLOAT32), wanted)
        whole = lambda part: unflatten(flatten(frozen) | flatten(part))  # noqa: E731
        compute = jax.value_and_grad(lambda part: loss(whole(part), inputs), has_aux=True)
        (total, metrics), gradients = jax.jit(compute)(trainable)
        return total, metrics["nats"], flatten(gradients)

    (total, nats, gradients), (padded_total, padded_nats, padded_gradients) = map(
        differentiated, (plain, with_loud_padding(plain))
    )
    np.testing.assert_allclose(padded_total, total, rtol=1e-6)
    np.testing.assert_allclose(padded_nats, nats, rtol=1e-6)
    assert padded_gradients.keys() == gradients.keys()
    for path, expected in gradients.items():
        got = padded_gradients[path]
        if path.split("/")[0] in ("embed", "head"):
            rows = plain.config.table_rows[path.split("/")[1]]
            np.testing.assert_array_equal(got[rows:], 0)
            got = got[:rows]
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_the_loss_is_that_of_a_softmax_over_tokens_alone():
    generator = np.random.default_rng(0)
    hidden = generator.normal(size=(40, 8)).astype(np.float32)
    tables = tuple(10 * generator.normal(size=(count, 8)).astype(np.float32) for count in (16, 8))
    uses = (TableUse(13, True), TableUse(5, True))
    targets = generator.integers(0, 18, 40)
    scores = hidden.astype(np.float64) @ np.concatenate([tables[0][:13], tables[1][:5]]).astype(np.float64).T
    top = scores.max(1)
    expected = top + np.log(np.exp(scores - top[:, None]).sum(1)) - scores[np.arange(40), targets]
    ones = jnp.ones(40)
    total, losses, _ = token_losses(jnp.asarray(hidden), tables, jnp.asarray(targets), ones, "float32", uses)
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)


def test_bits_per_byte_are_those_of_the_model_without(plain, tmp_path):
    write_tokenizer(tmp_path, english(300), size=320)
    documents = pack_documents(Tokenizer(tmp_path), english(20), 64)
    results = [
        bits_per_byte(model.network, model.on_device(FLOAT32), documents, batch_size=2, precision=FLOAT32)
        for model in (plain, with_loud_padding(plain))
    ]
    assert results[1].bits_per_byte == pytest.approx(results[0].bits_per_byte, rel=1e-6)


def test_padding_is_cut_on_export(plain, tmp_path):
    for name, model in (("plain", plain), ("padded", with_loud_padding(plain))):
        save(tmp_path / name, model.config, model.weights, model.hf_config, tmp_path)
    assert (tmp_path / "padded/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    config, weights, saved = load(tmp_path / "padded")
    assert config.total_rows == saved["vocab_size"] == weights["embed"]["base"].shape[0] == plain.config.total_rows
