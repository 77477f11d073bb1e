"""What is left out, against what a plain reading of each rule leaves out."""

import itertools
import random

import numpy as np
import pytest
from inputs import chinese, english

from cpt_jax.core.errors import UserError
from cpt_jax.data import duplicates
from cpt_jax.data.cleaning import Cleaning
from cpt_jax.data.duplicates import (
    EXACT,
    KEPT,
    NEAR,
    PERMUTATIONS,
    SHINGLE_WORDS,
    Signer,
    exact_duplicates,
    near_duplicates,
)
from cpt_jax.data.filters import find_filter, gopher, repeats, symbols
from cpt_jax.data.statistics import Samples, Statistics, length_bin, scripts_of
from cpt_jax.data.words import EvaluationTexts, runs_of, words_of

PROSE = (
    "The river ran past the old town, and the people who lived there knew that it would rise with the snow. "
    "They had built their houses on the hill, away from the water, because their parents had told them to. "
    "When the spring came they watched the ice break, and the children counted the pieces that went by."
)


def word_runs(text: str, length: int) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[place : place + length]) for place in range(len(words) - length + 1)}


def test_words_are_the_same_whatever_case_spaces_and_punctuation():
    assert words_of("The  river,\nRAN—past: don't 2nd été 国务院有关 ราชอาณา") == (
        ["the", "river", "ran", "past", "don", "t", "2nd", "été", *"国务院有关", *"ราชอาณา"]
    )


def test_runs_are_equal_where_words_are():
    generator = random.Random(0)
    first, second = (generator.choices("abcd", k=400) for _ in range(2))
    numbers = {
        run: number
        for run, number in zip(
            zip(*(first[i:] for i in range(5)), strict=False), runs_of(" ".join(first), 5), strict=True
        )
    }
    assert len(set(numbers.values())) == len(numbers)
    for run, number in zip(
        zip(*(second[i:] for i in range(5)), strict=False), runs_of(" ".join(second), 5), strict=True
    ):
        assert numbers.get(run, number) == number
    assert len(runs_of("two words", 5)) == 1
    assert len(runs_of("...", 5)) == 0


def test_evaluation_texts_are_found_as_by_sets_of_words():
    sets = {"law": chinese(30, seed=5), "tales": english(30, seed=6)}
    texts = [*chinese(60, seed=7), *english(60, seed=8)]
    # An excerpt, in another case and with other punctuation.
    texts.append("It begins otherwise; " + sets["tales"][0].upper().replace(" ", ",  ") + " and ends so")
    index = EvaluationTexts(sets.items(), 8)
    known = {name: set().union(*(word_runs(each, 8) for each in members)) for name, members in sets.items()}
    for text in texts:
        own = word_runs(text, 8)
        shared = [name for name, runs in known.items() if own & runs]
        reason = index.reason(text)
        assert (reason is not None) == bool(shared), text
        assert reason is None or reason in {f"8 words in a row of {name}" for name in shared}
    assert index.reason(texts[-1]) is not None
    assert sum(index.reason(text) is None for text in texts) > 20


def hashes(texts):
    from cpt_jax.data.holdout import text_hash

    return np.frombuffer(b"".join(map(text_hash, texts)), "<u8").reshape(-1, 2)


def test_of_equal_texts_the_first_stays(monkeypatch):
    generator = random.Random(1)
    splits = [generator.choices([f"text {n}" for n in range(60)], k=count) for count in (40, 0, 1, 90)]
    seen: set[str] = set()
    expected = [[EXACT if text in seen or seen.add(text) else KEPT for text in split] for split in splits]
    for at_once in (10_000, 7):
        monkeypatch.setattr("cpt_jax.data.duplicates._AT_ONCE", at_once)
        found = exact_duplicates([hashes(split) for split in splits])
        assert [each.tolist() for each in found] == expected


def edited(text: str, share: float, generator: random.Random) -> str:
    words = text.split()
    for place in generator.sample(range(len(words)), round(share * len(words))):
        words[place] = f"edit{generator.randint(0, 10**6)}"
    return " ".join(words)


def overlap(first: str, second: str) -> float:
    """Jaccard's share of runs of words, by sets."""
    runs = [word_runs(text, SHINGLE_WORDS) for text in (first, second)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_a_signature_tells_what_two_texts_have_in_common():
    generator, signer = random.Random(2), Signer()
    vocabulary = [f"word{n}" for n in range(3000)]
    differences = []
    for share in (0.0, 0.01, 0.03, 0.1):
        text = " ".join(generator.choices(vocabulary, k=500))
        other = edited(text, share, generator)
        agreement = (signer.signature(text) == signer.signature(other)).mean()
        differences.append(agreement - overlap(text, other))
    # 128 entries: a standard deviation of at most 0.044.
    assert np.abs(differences).max() < 0.15
    assert differences[0] == 0


def test_texts_without_words_are_not_near_to_each_other():
    signer = Signer()
    signatures = np.stack([signer.signature(text) for text in ("!!!", "😀 😀", "∑ = ∫", "!!!", "a word")])
    (found,) = near_duplicates([signatures], [np.zeros(5, np.uint8)], 0.8)
    assert found.tolist() == [KEPT, KEPT, KEPT, NEAR, KEPT]


def test_near_duplicates_are_those_of_jaccard_and_the_first_stays():
    generator, signer = random.Random(4), Signer()
    vocabulary = [f"word{n}" for n in range(3000)]
    originals = [" ".join(generator.choices(vocabulary, k=300)) for _ in range(40)]
    near = [edited(text, 0.01, generator) for text in originals[:20]]
    far = [edited(text, 0.2, generator) for text in originals[20:]]
    assert min(overlap(*pair) for pair in zip(originals[:20], near, strict=True)) > 0.85
    assert max(overlap(*pair) for pair in zip(originals[20:], far, strict=True)) < 0.5
    documents = [*originals, *near, *far]
    order = generator.sample(range(80), 80)
    signatures = np.stack([signer.signature(documents[place]) for place in order])
    cut = [signatures[:30], signatures[30:30], signatures[30:]]
    found = np.concatenate(near_duplicates(cut, [np.zeros(len(part), np.uint8) for part in cut], 0.8))
    left_out = {order[place] for place in np.flatnonzero(found == NEAR)}
    expected = {max((n, 40 + n), key=order.index) for n in range(20)}
    assert left_out == expected
    # What is left out already is nobody's first.
    gone = np.array(
        [number in {n if order.index(n) < order.index(40 + n) else 40 + n for n in range(20)} for number in order]
    )
    again = near_duplicates(cut, np.split(np.where(gone, EXACT, KEPT).astype(np.uint8), [30, 30]), 0.8)
    assert not (np.concatenate(again) == NEAR).any()


def test_a_chain_of_edits_keeps_its_first():
    generator, signer = random.Random(5), Signer()
    chain = [" ".join(generator.choices([f"word{n}" for n in range(3000)], k=300))]
    for _ in range(6):
        chain.append(edited(chain[-1], 0.01, generator))
    signatures = [np.stack([signer.signature(text) for text in chain])]
    [found] = near_duplicates(signatures, [np.zeros(7, np.uint8)], 0.75)
    assert found.tolist() == [KEPT] + [NEAR] * 6


@pytest.mark.parametrize(
    ("function", "text", "reason"),
    [
        (gopher, PROSE, None),
        (gopher, "too short", "fewer than 50"),
        (gopher, "a b " * 60, "shorter than 3"),
        (gopher, PROSE.replace(" the ", " #### the "), "hash"),
        (gopher, "\n".join("- " + line for line in PROSE.split(".")), "bullets"),
        (gopher, "\n".join(line + "..." for line in PROSE.split(",")), "ellipsis"),
        (gopher, " ".join("1234 5678" if n % 3 else w for n, w in enumerate(PROSE.split())), "no letter"),
        (gopher, "wordy stuff beyond anything " * 20, "commonest words"),
        (repeats, PROSE, None),
        (repeats, "\n".join([PROSE] * 3), "lines repeat"),
        (repeats, "\n".join([*"abcdefgh", PROSE, PROSE]), "fifth of the text is in lines"),
        (repeats, "over again " * 30, "one pair of words"),
        (symbols, PROSE, None),
        (symbols, "国务院有关部门应当依照本法规定。", None),
        (symbols, "|---|---|\n| 1 | == |", "more symbols than letters"),
    ],
)
def test_built_in_filters(function, text, reason):
    found = function(text)
    assert found is None if reason is None else reason in found


def test_languages_are_told():
    wanted = find_filter("language=zh,de")
    assert wanted("国务院有关部门应当依照本法规定" * 3) is None
    assert wanted(PROSE) == "language en"


def test_a_function_is_a_filter(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def shout(text):\n    return 'shouted' if text.isupper() else None\n"
        "def starts(text, with_what):\n    return with_what if text.startswith(with_what) else None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert find_filter("mine:shout")("HEY") == "shouted"
    assert find_filter("mine:starts=ab")("abc") == "ab"
    assert find_filter("mine:starts=ab")("cab") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(filters=("gofer",)), r"'gofer' \(did you mean 'gopher'\?\)"),
        (dict(filters=("nowhere:function",)), "cannot be imported"),
        (dict(filters=("json:nothing",)), "cannot be imported"),
        (dict(filters=("json:__name__",)), "is no function"),
        (dict(filters=("language",)), "names no language"),
        (dict(filters=("language=zh,xx",)), "there is no language 'xx'"),
        (dict(filters=("gopher=3",)), "takes no argument"),
        (
            dict(near_duplicates=1.0),
            r"near duplicates of 1.0: give what they have in common, 0.3 to 0.99 .* equal ones are",
        ),
        (dict(evaluation_words=1), "at least 3"),
        (dict(evaluation_sets=("a.jsonl",)), "but not evaluation_words"),
    ],
)
def test_wrong_cleaning_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Cleaning(**settings)


def test_characters_are_counted_by_script():
    found = scripts_of(["国务院 abc", "Привет, 123 ก"])
    assert found == {"Han": 3, "Latin": 3, "Cyrillic": 6, "Thai": 1, "Common": 7}


def test_statistics_do_not_depend_on_how_documents_are_put_together():
    texts = [*english(90), *chinese(90), *english(60, seed=2)]
    whole, merged = Statistics(), Statistics()
    whole.add(texts, [len(text) for text in texts])
    for text in texts[::3]:
        whole.leave_out("third", text)
    parts = []
    for start in range(0, 240, 80):
        part, some = Statistics(), texts[start : start + 80]
        part.add(some, [len(text) for text in some])
        parts.append(part)
    for index, text in enumerate(reversed(texts[::3])):
        parts[index % 3].leave_out("third", text)
    for part in reversed(parts):
        merged.merge(part.to_json())
    assert merged.to_json() == whole.to_json()
    assert len(whole.to_json()["left_out"]["third"]) == 20


def test_a_sample_is_the_same_in_any_order():
    texts = english(200)
    first, second = Samples(10), Samples(10)
    for text in texts:
        first.add(text)
    for text in [*reversed(texts), *texts]:
        second.add(text)
    assert first.entries() == second.entries()
    assert len(first.entries()) == 10


def test_lengths_are_binned_by_half_octaves():
    for length, place in itertools.pairwise([length_bin(n) for n in range(5000)]):
        assert place - length in (0, 1, 2, 3)
    for length in range(1, 5000):
        assert 2 ** (length_bin(length) / 2) <= length < 2 ** ((length_bin(length) + 1) / 2)


def test_equal_texts_have_both_halves_of_the_hash_in_common():
    hashes = np.array([[1, 1], [1, 2], [2, 2], [1, 1], [1, 2]], np.uint64)
    assert exact_duplicates([hashes])[0].tolist() == [KEPT, KEPT, KEPT, EXACT, EXACT]


def test_documents_of_a_band_are_compared_with_the_first_and_with_the_one_before():
    first, second = duplicates._pairs(np.array([5, 7, 5, 5, 7], np.uint64))
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == {(0, 2), (2, 3), (0, 3), (1, 4)}


def test_candidates_below_the_threshold_are_no_duplicates():
    pytest.importorskip("datasketch")
    generator = np.random.default_rng(0)
    signatures = generator.integers(0, 2**32, (2, PERMUTATIONS), dtype=np.uint32)
    # In the same bands up to the middle.
    signatures[1, : PERMUTATIONS // 2] = signatures[0, : PERMUTATIONS // 2]
    nothing = [np.zeros(2, np.uint8)]
    assert near_duplicates([signatures], nothing, 0.8)[0].tolist() == [KEPT, KEPT]
    signatures[1, : PERMUTATIONS * 9 // 10] = signatures[0, : PERMUTATIONS * 9 // 10]
    assert near_duplicates([signatures], nothing, 0.8)[0].tolist() == [KEPT, NEAR]


def test_what_is_looked_at_in_parts_is_what_is_looked_at_at_once(monkeypatch):
    datasketch = pytest.importorskip("datasketch")
    text = " ".join(f"word{number}" for number in range(9000))
    sketch = datasketch.MinHash(PERMUTATIONS, scheme="affine32", hashfunc=lambda run: run)
    sketch.update_batch(np.unique(runs_of(text, SHINGLE_WORDS).astype(np.uint32)))
    np.testing.assert_array_equal(Signer().signature(text), sketch.hashvalues)
    generator = np.random.default_rng(0)
    hashes = [generator.integers(0, 9, (count, 2), dtype=np.uint64) for count in (40, 0, 25)]
    signatures = [generator.integers(0, 2, (count, 1)).repeat(PERMUTATIONS, 1).astype(np.uint32) for count in (4, 7)]
    nothing = [np.zeros(len(part), np.uint8) for part in signatures]
    expected = exact_duplicates(hashes), near_duplicates(signatures, nothing, 0.8)
    monkeypatch.setattr(duplicates, "_AT_ONCE", 16)
    monkeypatch.setattr(duplicates, "_PAIRS_AT_ONCE", 2)
    found = exact_duplicates(hashes), near_duplicates(signatures, nothing, 0.8)
    for one, other in zip(expected, found, strict=True):
        assert [part.tolist() for part in one] == [part.tolist() for part in other]
    assert sum((part == NEAR).sum() for part in expected[1]) == 9
