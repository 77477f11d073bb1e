"""What a grown model keeps, what rows it gets, and rows that are fitted in it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from inputs import chinese, hf_config, random_weights, tiny_config
from row_inputs import NEW, TEXTS
from safetensors.numpy import load_file, save_file

from cpt_jax.checkpoint.hf import load
from cpt_jax.checkpoint.hf_write import save
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.tree import flatten
from cpt_jax.models.decoder import apply
from cpt_jax.recipe.rows import Growth, Probe, RowProbe, grow_model
from cpt_jax.vocab.init_rows import FITTED_STEP, ROWS_STEP, Distilled, Focus, Mean, Random, SubwordMean, size_of_rows
from cpt_jax.vocab.tokenizer import Tokenizer


def on_host(weights: dict) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(weights).items()}


def test_rows_are_made_from_a_bounded_sample_of_the_corpus(bases, grown, tmp_path, monkeypatch):
    class Seen:
        def build(self, tables, context):
            self.texts = list(context.texts())
            return {name: np.zeros((len(context.pieces), table.shape[1])) for name, table in tables.items()}

    texts, seen = chinese(500), Seen()
    growth = Growth(write_model(tmp_path, grown[0]), grown[1], texts=lambda: iter(texts))
    growth.rows(seen)
    assert seen.texts == texts
    monkeypatch.setattr("cpt_jax.recipe.rows.ROWS_BYTES", 2000)
    growth.rows(seen)
    assert 1000 < sum(len(text.encode()) for text in seen.texts) <= 2000


def write_model(root: Path, tokenizer: Path, rows: int = 320, dtype=np.float32, **changes) -> Path:
    config = tiny_config(vocab_size=rows, **changes)
    save(root / "model", config, random_weights(config), hf_config(config), tokenizer, dtype=dtype)
    return root / "model"


VARIANTS = {
    "subword-mean": SubwordMean(weights="length", calibrated=True),
    "mean": Mean(),
    "random": Random(),
    "focus": Focus(width=20),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_old_weights_are_bit_identical_and_every_new_piece_has_a_row(grown, tmp_path, variant, tied):
    base, extended = grown
    model = write_model(tmp_path, base, dtype=ml_dtypes.bfloat16, tie_word_embeddings=tied)
    grow_model(model, extended, variant, 0, tmp_path / "out", lambda: TEXTS)
    config, weights, saved = load(tmp_path / "out")
    before, after = on_host(load(model)[1]), on_host(weights)
    assert config.vocab_size == saved["vocab_size"] == 320 + NEW
    assert after.keys() == before.keys()
    assert ("head/base" in after) != tied
    for path, leaf in before.items():
        kept = after[path][:320] if path in ("embed/base", "head/base") else after[path]
        assert kept.dtype == leaf.dtype
        np.testing.assert_array_equal(kept.view(np.uint16), leaf.view(np.uint16))
        if path in ("embed/base", "head/base"):
            new = after[path][320:].astype(np.float32)
            assert new.shape == (NEW, 32)
            assert np.isfinite(new).all()
            assert np.abs(new).max() > 0
    assert Tokenizer(tmp_path / "out").size == config.vocab_size


def test_a_model_of_several_types_is_grown_without_loss(grown, tmp_path):
    base, extended = grown
    model = write_model(tmp_path, base)
    tensors = load_file(model / "model.safetensors")
    table = tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    save_file(tensors | {"model.embed_tokens.weight": table}, model / "model.safetensors")
    grow_model(model, extended, Mean(), 0, tmp_path / "out")
    before, after = on_host(load(model)[1]), on_host(load(tmp_path / "out")[1])
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path][:320] if path == "embed/base" else after[path], leaf, err_msg=path)


def test_each_table_gets_rows_of_its_own(grown, tmp_path):
    base, extended = grown
    growth = Growth(write_model(tmp_path, base, tie_word_embeddings=False), extended)
    rows = growth.rows(SubwordMean())
    for name, old in growth.tables.items():
        for row, ids in zip(rows[name], growth.pieces, strict=True):
            np.testing.assert_allclose(row, old[ids].mean(0), rtol=1e-5, atol=1e-6)
    assert np.abs(rows["embed"] - rows["head"]).max() > 0.1


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_that_no_piece_has_give_way_and_are_told(grown, tmp_path, capsys, tied):
    base, extended = grown
    model = write_model(tmp_path, base, rows=352, tie_word_embeddings=tied)
    grow_model(model, extended, SubwordMean(), 0, tmp_path / "out")
    assert "32 rows of the embedding belong to no piece" in capsys.readouterr().err
    before, after = on_host(load(model)[1]), on_host(load(tmp_path / "out")[1])
    for path in ("embed/base",) if tied else ("embed/base", "head/base"):
        assert after[path].shape == (320 + NEW, 32)
        np.testing.assert_array_equal(after[path][:320], before[path][:320])
        first = Growth(model, extended).pieces[0]
        np.testing.assert_allclose(after[path][320], before[path][first].mean(0), rtol=1e-5, atol=1e-6)


def test_pieces_that_have_no_row_start_as_the_mean_and_are_told(grown, tmp_path, capsys):
    base, extended = grown
    model = write_model(tmp_path, base, rows=317)
    grow_model(model, extended, SubwordMean(), 0, tmp_path / "out")
    assert "3 pieces more than the embedding has rows" in capsys.readouterr().err
    before, after = (on_host(load(directory)[1])["embed/base"] for directory in (model, tmp_path / "out"))
    assert after.shape == (320 + NEW, 32)
    np.testing.assert_array_equal(after[:317], before)
    np.testing.assert_allclose(after[317:320], np.tile(before.mean(0), (3, 1)), rtol=1e-5, atol=1e-6)


def test_a_smaller_tokenizer_is_refused(grown, tmp_path):
    base, extended = grown
    model = write_model(tmp_path, extended, rows=320 + NEW)
    with pytest.raises(UserError, match="has 320 pieces, fewer than the model's 380"):
        Growth(model, base)


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("config.json", {"pad_token_id": 320}),
        ("generation_config.json", {"eos_token_id": [2, 351]}),
        ("generation_config.json", {"suppress_tokens": [5, 330]}),
    ],
)
def test_an_id_that_is_no_token_and_would_be_a_piece_is_refused(grown, tmp_path, file, named):
    base, extended = grown
    path = write_model(tmp_path, base, rows=352) / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | named))
    with pytest.raises(UserError, match=rf"{file} names 3\d\d as \w+, but the tokenizer has 320 pieces"):
        Growth(path.parent, extended)


# Fitted rows
FITTED = Distilled(steps=40, batch_size=4, sequence_length=32, learning_rate=2e-2)


def distance(growth: Growth, rows: dict) -> float:
    """Mean squared distance of hidden states after a text read with new pieces to those after its old pieces."""
    model, precision = growth.model(rows), Precision(compute="float32")
    texts, start = chinese(24, seed=8), growth.base.start_id
    weights, states = model.on_device(precision), []
    for tokenizer in (growth.extended, growth.base):
        documents = [[start, *ids] for ids in tokenizer.encode_documents(texts)]
        longest = max(map(len, documents))
        tokens = jnp.asarray([ids + [0] * (longest - len(ids)) for ids in documents])
        places = jnp.broadcast_to(jnp.arange(longest), tokens.shape)
        hidden = apply(model.network, weights, tokens, places, jnp.ones_like(tokens), compute_dtype="float32")
        states.append(np.stack([row[len(ids) - 1] for row, ids in zip(np.asarray(hidden), documents, strict=True)]))
    return float(np.square(states[0] - states[1]).mean())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_fitted_rows_bring_the_model_nearer_to_what_it_does_with_the_old_pieces(grown, tmp_path, tied):
    base, extended = grown
    model = write_model(tmp_path, base, tie_word_embeddings=tied, num_layers=1, max_position_embeddings=512)
    growth = Growth(model, extended, texts=lambda: TEXTS)
    kept = {name: old.copy() for name, old in growth.tables.items()}
    mean, fitted = growth.rows(SubwordMean()), growth.rows(FITTED)
    assert distance(growth, fitted) < 0.9 * distance(growth, mean)
    assert fitted.keys() == kept.keys()
    for name, old in kept.items():
        np.testing.assert_array_equal(growth.tables[name], old)


@pytest.mark.parametrize(
    ("fastest", "expected"), [("bfloat16", "bfloat16"), ("float32", "float32"), ("float16", "float32")]
)
def test_rows_are_fitted_and_probed_in_what_the_hardware_multiplies_quickly(
    grown, tmp_path, monkeypatch, fastest, expected
):
    class Seen:
        def build(self, tables, context):
            self.model = context.model()
            return {}

    monkeypatch.setattr("cpt_jax.recipe.rows.fastest_type", lambda: fastest)
    seen = Seen()
    Growth(write_model(tmp_path, grown[0]), grown[1]).rows(seen)  # type: ignore[arg-type]
    types = {flatten(seen.model.weights)["embed/base"].dtype, seen.model.compute_dtype, Probe().precision.dtype}
    assert types == {jnp.dtype(expected)}


def test_a_probe_takes_steps_by_the_size_of_the_old_rows(grown, tmp_path):
    growth = Growth(write_model(tmp_path, grown[0], num_layers=1), grown[1], texts=lambda: TEXTS)
    probe = RowProbe(growth, TEXTS[:2], Probe(steps=(0, 3), sequence_length=32))
    assert probe._rate(1) == pytest.approx(ROWS_STEP * size_of_rows(growth.tables.values()))


@pytest.mark.parametrize("given", [None, 1e-3])
def test_rows_are_fitted_by_steps_of_the_size_of_the_old_rows(grown, tmp_path, given):
    growth = Growth(write_model(tmp_path, grown[0], num_layers=1), grown[1], texts=lambda: TEXTS)
    fitted = growth.rows(Distilled(steps=1, batch_size=1, sequence_length=32, learning_rate=given))["embed"]
    # Adam's first step is the whole rate, whatever the gradient.
    moved = np.abs(fitted - growth.rows(SubwordMean())["embed"]).max()
    assert moved == pytest.approx(given or FITTED_STEP * size_of_rows(growth.tables.values()), rel=0.01)


def test_the_step_that_fits_rows_is_compiled_once(grown, tmp_path):
    base, extended = grown
    growth = Growth(write_model(tmp_path, base, num_layers=1), extended, texts=lambda: TEXTS)
    compiled = []

    def listen(event: str, _seconds: float, fun_name: str = "", **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    growth.rows(Distilled(steps=3, batch_size=1, sequence_length=32))
    jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled.count("jit(step)") == 1


def test_fitting_to_one_short_document_is_the_same_each_time_and_to_none_is_told(grown, tmp_path):
    base, extended = grown
    model, settings = write_model(tmp_path, base, num_layers=1), Distilled(steps=2, sequence_length=32)
    text = "国务院有关部门应当依照本法规定。违反"
    first, second = (Growth(model, extended, texts=lambda: [text]).rows(settings)["embed"] for _ in range(2))
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, second)
    # Only the pieces of the text have moved.
    moved = np.flatnonzero((first != Growth(model, extended).rows(SubwordMean())["embed"]).any(1)) + 320
    assert set(moved) == {index for index in Tokenizer(extended).encode(text) if index >= 320}
    for texts in ([], ["国"]):
        with pytest.raises(UserError, match="no text to fit new rows on"):
            Growth(model, extended, texts=lambda texts=texts: texts).rows(settings)
