"""New rows against plain formulas, and what a grown model keeps."""

import dataclasses
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from inputs import chinese, english, hf_config, random_weights, tiny_config
from safetensors.numpy import load_file, save_file

from cpt_jax.checkpoint.hf import load, save
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.tree import flatten
from cpt_jax.models.decoder import apply
from cpt_jax.recipe.rows import Growth, grow_model
from cpt_jax.vocab.extend import ContinuedBPE, extend
from cpt_jax.vocab.init_rows import Distilled, Focus, Mean, Random, RowContext, SubwordMean, Wechsel, sparsemax
from cpt_jax.vocab.static import word_vectors
from cpt_jax.vocab.tokenizer import Tokenizer

TEXTS = chinese(200, seed=2)
NEW = 60


def on_host(weights: dict) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(weights).items()}


@pytest.fixture(scope="module")
def grown(bases, tmp_path_factory) -> tuple[Path, Path]:
    """(base, extended) tokenizer directories."""
    out = tmp_path_factory.mktemp("grown") / "tokenizer"
    extend(bases["gpt2"], ContinuedBPE(new_tokens=NEW), chinese(400), english(300), out)
    return bases["gpt2"], out


def context_of(base: Path, extended: Path, texts=TEXTS, pieces=None) -> RowContext:
    from cpt_jax.vocab.extend import old_segmentation

    before, after = Tokenizer(base), Tokenizer(extended)
    found = old_segmentation(before, after) if pieces is None else pieces
    no_model = lambda: pytest.fail("needs no model")  # noqa: E731
    return RowContext(pieces=found, base=before, extended=after, texts=lambda: texts, model=no_model, seed=3)


def table(rows: int, width: int = 8) -> np.ndarray:
    generator = np.random.default_rng(0)
    return (generator.normal(0, 1, (rows, width)) @ np.diag(np.arange(1, width + 1)) + 3).astype(np.float32)


def new_id(tokenizer: Tokenizer, text: str) -> int:
    (index,) = tokenizer.encode(text)
    return index


# From the old rows


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("weights", ["uniform", "length", "first", "last"])
def test_subword_means_are_those_of_a_plain_sum(grown, weights, calibrated):
    context, tables = context_of(*grown), {"embed": table(320), "head": -table(320, 5)}
    rows = SubwordMean(weights=weights, calibrated=calibrated).build(tables, context)
    for name, old in tables.items():
        assert rows[name].shape == (NEW, old.shape[1])
        for row, ids in zip(rows[name], context.pieces, strict=True):
            row_sum, total, norms = np.zeros(old.shape[1]), 0.0, []
            for place, index in enumerate(ids):
                of_kind = {
                    "uniform": 1.0,
                    "length": len(context.base.backend.id_to_token(index)),
                    "first": 2.0**-place,
                    "last": 2.0 ** (place - len(ids)),
                }
                row_sum += of_kind[weights] * old[index].astype(np.float64)
                total += of_kind[weights]
                norms.append(np.linalg.norm(old[index]))
            expected = row_sum / total
            if calibrated:
                expected *= np.mean(norms) / np.linalg.norm(expected)
            np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)


def test_a_part_of_a_character_weighs_its_own_bytes(grown):
    base = Tokenizer(grown[0])
    (word,), (first, *_) = base.encode(" the"), base.encode("法")
    tables = {"embed": table(320)}
    rows = SubwordMean(weights="length").build(tables, context_of(*grown, pieces=[[word, first]]))
    expected = (4 * tables["embed"][word] + tables["embed"][first]) / 5
    np.testing.assert_allclose(rows["embed"][0], expected, rtol=1e-5)


def test_the_mean_is_that_of_the_whole_table(grown):
    tables = {"embed": table(320), "head": -table(320, 5)}
    rows = Mean().build(tables, context_of(*grown))
    for name, old in tables.items():
        np.testing.assert_allclose(rows[name], np.tile(old.mean(0), (NEW, 1)), rtol=1e-5)


def test_random_rows_have_the_tables_mean_and_covariance(grown):
    old = {"embed": table(5000)}
    old["embed"][:, 1] += 2 * old["embed"][:, 0]
    context = context_of(*grown, pieces=[[0]] * 40_000)
    rows = Random().build(old, context)["embed"]
    covariance = np.cov(old["embed"], rowvar=False)
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    np.testing.assert_allclose(np.cov(rows, rowvar=False) / scale, covariance / scale, atol=0.03)
    np.testing.assert_allclose((rows.mean(0) - old["embed"].mean(0)) / np.sqrt(np.diag(covariance)), 0, atol=0.03)
    np.testing.assert_array_equal(Random().build(old, context)["embed"], rows)
    other = Random().build(old, dataclasses.replace(context, seed=4))["embed"]
    assert np.abs(other - rows).max() > 1


# From static vectors


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    scores = np.random.default_rng(0).normal(0, 1, (50, 20))
    found = sparsemax(scores)
    for row, given in zip(found, scores, strict=True):
        # The nearest point is max(score - t, 0) with the t that makes the sum one: halve the interval of t.
        low, high = given.min() - 1, given.max()
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if np.maximum(given - middle, 0).sum() > 1 else (low, middle)
        np.testing.assert_allclose(row, np.maximum(given - low, 0), atol=1e-9)
    np.testing.assert_allclose(found.sum(1), 1)
    assert (found == 0).any()
    np.testing.assert_allclose(sparsemax(scores + 7), found, atol=1e-9)
    np.testing.assert_array_equal(sparsemax(np.array([[5.0, 0.0]])), [[1.0, 0.0]])


@pytest.fixture(scope="module")
def twins(bases, tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """An extension, and text in which 国务院 stands where the base's " the" stands, and 公民 where " was" does."""
    generator = np.random.default_rng(0)
    places = {" the": ["water", "under", "old"], " was": ["people", "began", "history"]}
    twin = {" the": "国务院", " was": "公民"}
    texts = []
    for _ in range(400):
        word = list(places)[generator.integers(2)]
        before, after = generator.choice(places[word], 2)
        texts.append(f"{before}{word if generator.integers(2) else twin[word]} {after}")
    out = tmp_path_factory.mktemp("twins") / "tokenizer"
    extend(bases["gpt2"], ContinuedBPE(new_tokens=0, candidates=("国务院", "公民", "违反")), texts, [], out)
    return bases["gpt2"], out, texts


def test_focus_takes_the_rows_of_pieces_in_the_same_company(twins):
    base, extended, texts = twins
    context = context_of(base, extended, texts)
    # One column a row: a new row is its weights.
    weights = Focus(width=20, window=2).build({"embed": np.eye(320, dtype=np.float32)}, context)["embed"]
    for text, word in (("国务院", " the"), ("公民", " was")):
        row = weights[new_id(context.extended, text) - 320]
        assert row.argmax() == new_id(context.base, word)
        assert row.sum() == pytest.approx(1, rel=1e-5)
        assert row.min() == 0
    # 违反 is in no text: its pieces' mean.
    rare = new_id(context.extended, "违反") - 320
    np.testing.assert_array_equal(
        weights[rare], SubwordMean().build({"embed": np.eye(320, dtype=np.float32)}, context)["embed"][rare]
    )


@pytest.mark.parametrize("texts", [[], ["the city"]], ids=["no text", "too little"])
def test_focus_without_enough_text_is_the_pieces_mean(grown, texts):
    context, tables = context_of(*grown, texts=texts), {"embed": table(320)}
    np.testing.assert_array_equal(
        Focus().build(tables, context)["embed"], SubwordMean().build(tables, context)["embed"]
    )


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


def test_focus_compares_some_rows_at_a_time(grown, monkeypatch):
    generator, count = np.random.default_rng(0), 20_000
    context = context_of(*grown, pieces=[[0]] * count)
    vectors = {index: generator.normal(size=4) for index in range(context.base.size + count)}
    monkeypatch.setattr("cpt_jax.vocab.init_rows.static_vectors", lambda *_: vectors)
    tracemalloc.start()
    rows = Focus().build({"embed": table(320)}, context)["embed"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    similarities = 8 * count * context.base.size
    assert peak < 0.3 * similarities
    assert len(np.unique(rows, axis=0)) > 0.5 * count


def write_vectors(path: Path, vectors: dict[str, list[float]], header: bool = True) -> str:
    width = len(next(iter(vectors.values())))
    lines = [f"{len(vectors)} {width}"] * header
    lines += [" ".join([word, *map(str, vector)]) for word, vector in vectors.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("header", [True, False])
def test_wechsel_weighs_the_nearest_old_pieces(twins, tmp_path, monkeypatch, header):
    monkeypatch.setattr("cpt_jax.vocab.init_rows.ROWS_AT_ONCE", 1)
    base, extended, _ = twins
    source = write_vectors(tmp_path / "en.vec", {"river": [2, 0, 0], "city": [0, 3, 0], "school": [0.0, 1, 1]}, header)
    target = write_vectors(tmp_path / "zh.vec", {"国务院": [1, 0.1, 0], "公民": [0, 1, 0.8]}, header)
    context = context_of(base, extended)
    settings = Wechsel(source=source, target=target, neighbours=3, temperature=0.2)
    rows = settings.build({"embed": np.eye(320, dtype=np.float32)}, context)["embed"]
    # " river" is a piece, and has its word's vector; pieces that several words share lie between them.
    old: dict[int, list] = {}
    for word, vector in (("river", [2, 0, 0]), ("city", [0, 3, 0]), ("school", [0, 1, 1])):
        for index in {*context.base.encode(word), *context.base.encode(" " + word)}:
            old.setdefault(index, []).append(vector)
    unit = {index: np.sum(found, 0) / np.linalg.norm(np.sum(found, 0)) for index, found in old.items()}
    for text, vector in (("国务院", [1, 0.1, 0]), ("公民", [0, 1, 0.8])):
        query = np.array(vector) / np.linalg.norm(vector)
        row = rows[new_id(context.extended, text) - 320]
        chosen = np.flatnonzero(row)
        assert len(chosen) == 3
        near = np.array([query @ unit[index] for index in chosen])
        np.testing.assert_allclose(row[chosen], np.exp(near / 0.2) / np.exp(near / 0.2).sum(), rtol=1e-4)
        assert near.min() >= sorted((query @ vector for vector in unit.values()), reverse=True)[2] - 1e-6
    absent = new_id(context.extended, "违反") - 320
    mean = SubwordMean().build({"embed": np.eye(320, dtype=np.float32)}, context)["embed"]
    np.testing.assert_array_equal(rows[absent], mean[absent])


def test_words_that_are_no_utf8_or_hold_a_carriage_return_are_words(twins, tmp_path):
    path = tmp_path / "cc.vec"
    path.write_bytes(b"3 2\r\nriver 1 0\r\n\xff\xfe 0 1\r\na\rb 0 1\n")
    tokenizer = Tokenizer(twins[0])
    (river,) = tokenizer.encode(" river")
    np.testing.assert_array_equal(word_vectors(path, tokenizer)[river], [1, 0])


def test_word_vectors_that_cannot_be_used_are_refused(twins, tmp_path):
    context = context_of(*twins[:2])
    good = write_vectors(tmp_path / "good.vec", {"国务院": [1, 0]})
    wide = write_vectors(tmp_path / "wide.vec", {"river": [1, 0, 0]})
    other = write_vectors(tmp_path / "other.vec", {"river": [1, 0]})
    (tmp_path / "words.vec").write_text("river 1 0\ncity one two\n")
    (tmp_path / "empty.vec").write_text("")
    cases = [
        (str(tmp_path / "none.vec"), good, "none.vec do not exist"),
        (str(tmp_path / "words.vec"), good, "words.vec, line 2: not 'word number number ...'"),
        (str(tmp_path / "empty.vec"), good, "holds no word vectors of one width"),
        (wide, good, "vectors of 3, .* of 2 numbers"),
        (other, other, "hold no words with old and new pieces"),
    ]
    for source, target, message in cases:
        with pytest.raises(UserError, match=message):
            Wechsel(source=source, target=target).build({"embed": table(320)}, context)


# The grown model


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
