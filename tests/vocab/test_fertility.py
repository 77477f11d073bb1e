"""Figures of a tokenizer are those of counting by hand; the curve is that of extensions of each size."""

import dataclasses

import numpy as np
import pytest
from inputs import chinese, compounds, english

from cpt_jax.vocab.extend import ContinuedBPE, Union, extend
from cpt_jax.vocab.fertility import ModelSizes, compare, curve, fertility, knee, speed
from cpt_jax.vocab.tokenizer import Tokenizer

HELD = chinese(60, seed=5)


def test_figures_are_those_of_counting_by_hand():
    found = fertility([[1, 2, 3], [4]], ["国务 院", "ab"])
    assert found.tokens_per_character == 4 / 6
    assert found.tokens_per_word == 4 / 3
    assert found.bytes_per_token == (10 + 2) / 4
    # Without a word; and of a tokenizer that gives nothing for it.
    assert fertility([[1, 2]], [" \n"]).tokens_per_word == 2
    assert fertility([[]], ["\0"]).bytes_per_token == 1


def test_documents_that_changed_and_their_tokens_are_counted(bases, tmp_path):
    extend(bases["gpt2"], ContinuedBPE(new_tokens=60), chinese(300), english(300), tmp_path / "out")
    base, extended = Tokenizer(bases["gpt2"]), Tokenizer(tmp_path / "out")
    texts = english(30) + chinese(10)
    found = compare("both", base, extended, texts)
    before, after = ([len(tokenizer.encode(text)) for text in texts] for tokenizer in (base, extended))
    assert found["documents"] == 40
    assert found["documents_changed"] == 10 / 40
    assert found["tokens_change"] == pytest.approx(sum(after) / sum(before) - 1)
    assert found["base"]["tokens_per_character"] == sum(before) / sum(map(len, texts))
    assert found["extended"]["bytes_per_token"] == sum(len(text.encode()) for text in texts) / sum(after)
    assert found["round_trip_failures"] == 0


@pytest.mark.parametrize(
    ("kind", "extension"),
    [
        ("gpt2", ContinuedBPE(new_tokens=1)),
        ("qwen", ContinuedBPE(new_tokens=1)),
        ("bpe", ContinuedBPE(new_tokens=1)),
        ("bpe", Union(new_tokens=1)),
        ("bpe", Union(new_tokens=1, scores="own")),
        ("unigram", Union(new_tokens=1)),
    ],
    ids=["gpt2", "qwen", "bpe", "bpe union", "bpe own", "unigram"],
)
def test_every_point_is_an_extension_of_that_size(bases, tmp_path, kind, extension):
    texts, sizes, base = chinese(300) + compounds(50), (30, 10, 20), Tokenizer(bases[kind])
    found = curve(base, extension, texts, english(100), HELD, sizes, None)["points"]
    rates = [point["tokens_per_character"] for point in found]
    assert rates == sorted(rates, reverse=True)
    assert found[0] == {
        "new_tokens": 0,
        "tokens_per_character": fertility(base.encode_documents(HELD), HELD).tokens_per_character,
    }
    for point, size in zip(found[1:], sorted(sizes), strict=True):
        out = tmp_path / str(size)
        done = extend(bases[kind], dataclasses.replace(extension, new_tokens=size), texts, english(100), out)
        expected = fertility(Tokenizer(out).encode_documents(HELD), HELD).tokens_per_character
        # A union leaves a piece out whose characters do not fit in any more, and the point holds some of them.
        assert done.new_pieces == point["new_tokens"] or isinstance(extension, Union)
        if done.new_pieces == point["new_tokens"]:
            assert point["tokens_per_character"] == expected
        else:
            assert rates[0] > expected >= point["tokens_per_character"]


def test_the_last_point_is_all_that_the_text_gives(bases):
    found = curve(Tokenizer(bases["gpt2"]), ContinuedBPE(new_tokens=1), HELD, [], HELD, (5, 10**6), None)
    sizes = [point["new_tokens"] for point in found["points"]]
    assert sizes[:2] == [0, 5]
    assert len(sizes) == 3
    assert 5 < sizes[2] < 10**6


def test_a_point_costs_what_its_rows_cost(bases):
    base, model = Tokenizer(bases["gpt2"]), ModelSizes(width=64, row=128, other_parameters=100_000)
    found = curve(base, ContinuedBPE(new_tokens=1), HELD, [], HELD, (10, 20), model)
    for point in found["points"]:
        logits = 2 * 64 * (base.size + point["new_tokens"])
        assert point["parameters"] == point["new_tokens"] * 64 * 2
        assert point["logit_share"] == pytest.approx(logits / (logits + 200_000))
        assert point["flops_per_character"] == pytest.approx(point["tokens_per_character"] * (logits + 200_000))


def test_the_knee_is_where_a_bent_line_bends():
    sizes = (500, 1000, 2000, 4000, 8000, 16_000, 32_000)
    for bend in (1000, 4000, 16_000):
        rates = [2 - 0.4 * np.log(min(size, bend)) / np.log(2) * 0.2 - 0.001 * np.log(size) for size in sizes]
        points = [dict(new_tokens=n, tokens_per_character=rate) for n, rate in zip(sizes, rates, strict=True)]
        assert knee(points) == bend


def test_the_knee_of_few_points_or_of_none_that_helps_is_the_last():
    def points(*rates):
        return [{"new_tokens": 500 * 2**i, "tokens_per_character": rate} for i, rate in enumerate(rates)]

    assert knee([]) == 0
    assert knee(points(1.0)) == 500
    assert knee(points(1.0, 0.8)) == 1000
    assert knee(points(1.0, 1.0, 1.0)) == 2000


def test_speeds_are_positive(bases):
    rates = speed(Tokenizer(bases["gpt2"]), english(50))
    assert set(rates) == {"encode", "decode"}
    assert min(rates.values()) > 0
