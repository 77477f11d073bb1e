"""New rows from static vectors: of pieces in the same company, or with near words."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from row_inputs import context_of, table

from cpt_jax.core.errors import UserError
from cpt_jax.vocab.extend import ContinuedBPE, extend
from cpt_jax.vocab.init_rows import Focus, SubwordMean, Wechsel, sparsemax
from cpt_jax.vocab.static import word_vectors
from cpt_jax.vocab.tokenizer import Tokenizer


def new_id(tokenizer: Tokenizer, text: str) -> int:
    (index,) = tokenizer.encode(text)
    return index


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
