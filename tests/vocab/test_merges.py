"""Merge learning with incremental counts is merge learning that counts anew each time."""

import collections
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_jax.vocab import merges
from cpt_jax.vocab.merges import PairCounts


def pair_counts(words: list[list[int]], weights: list[int]) -> collections.Counter[tuple[int, int]]:
    pairs = collections.Counter()
    for word, weight in zip(words, weights, strict=True):
        for pair in itertools.pairwise(word):
            pairs[pair] += weight
    return pairs


def merged(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    word, index = list(word), 0
    while index < len(word) - 1:
        if (word[index], word[index + 1]) == pair:
            word[index : index + 2] = [new]
        index += 1
    return word


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=14), min_size=1, max_size=6), st.data())
def test_the_most_frequent_pair_and_every_count_are_those_of_counting_anew(words, data):
    weights = [data.draw(st.integers(1, 3)) for _ in words]
    counted = PairCounts(words, weights)
    for new in range(10, 16):
        expected = pair_counts(words, weights)
        assert {pair: count for pair, count in counted.counts.items() if count} == expected
        found = counted.most_frequent(lambda _: True)
        if not expected:
            assert found is None
            break
        best = min(expected, key=lambda pair: (-expected[pair], pair))
        assert found == (best, expected[best])
        counted.merge(best, new)
        words = [merged(word, best, new) for word in words]
        uses = collections.Counter()
        for word, weight in zip(words, weights, strict=True):
            uses.update({token: weight * count for token, count in collections.Counter(word).items()})
        assert {token: count for token, count in counted.uses.items() if count} == uses


def test_a_pair_that_is_not_allowed_is_asked_for_once():
    counted = PairCounts([[1, 2, 3]], [5])
    asked = []

    def allowed(pair):
        asked.append(pair)
        return pair != (1, 2)

    for _ in range(3):
        assert counted.most_frequent(allowed) == ((2, 3), 5)
    assert asked.count((1, 2)) == 1


def test_a_pair_that_waits_is_asked_for_again_when_it_has_become_rarer():
    # (1, 2) five times, of which four stand before 3.
    counted = PairCounts([[1, 2, 3], [1, 2]], [4, 1])
    now = lambda pair, count: pair != (1, 2) or count < 5  # noqa: E731
    assert counted.most_frequent(lambda _: True, now) == ((2, 3), 4)
    counted.merge((2, 3), 10)
    assert counted.most_frequent(lambda pair: pair == (1, 2), now) == ((1, 2), 1)


def test_a_pair_that_waits_and_is_gone_is_not_given():
    counted = PairCounts([[1, 2, 3]], [4])
    now = lambda pair, count: pair != (1, 2)  # noqa: E731
    assert counted.most_frequent(lambda _: True, now) == ((2, 3), 4)
    counted.merge((2, 3), 10)
    assert counted.most_frequent(lambda pair: pair == (1, 2)) is None


def test_ids_and_weights_may_be_large_and_words_empty():
    counted = PairCounts([[70_000, 140_001], []], [300, 1])
    assert counted.most_frequent(lambda _: True) == ((70_000, 140_001), 300)
    assert counted.uses == {70_000: 300, 140_001: 300}


def test_a_text_that_is_counted_in_parts_is_the_text(monkeypatch):
    generator = random.Random(0)
    words = [generator.choices(range(4), k=generator.randint(1, 9)) for _ in range(20)]
    weights = [generator.randint(1, 5) for _ in words]
    whole = PairCounts(words, weights)
    monkeypatch.setattr(merges, "_AT_ONCE", 7)
    parts = PairCounts(words, weights)
    for new in range(10, 14):
        assert parts.counts == whole.counts
        assert parts.uses == whole.uses
        (pair, count), found = (each.most_frequent(lambda _: True) for each in (whole, parts))
        assert found == (pair, count)
        for each in (whole, parts):
            each.merge(pair, new)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 9])
def test_a_run_of_one_token_is_merged_from_the_left(length):
    counted = PairCounts([[7] * length], [1])
    counted.merge((7, 7), 8)
    assert counted.uses[8] == length // 2
    assert counted.uses[7] == length % 2
    assert counted.counts.get((8, 7), 0) == (length % 2 if length > 2 else 0)
    assert counted.counts.get((7, 8), 0) == 0
