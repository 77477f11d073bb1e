"""Extended tokenizers: nothing is taken from the base, and the merges are those of a plain implementation."""

import collections
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import chinese, english, write_tokenizer

from cpt_jax.core.errors import UserError
from cpt_jax.vocab.extend import ContinuedBPE, Union, adjacent_pairs, byte_characters, extend, old_segmentation
from cpt_jax.vocab.fertility import compare
from cpt_jax.vocab.gate import Limits, check, fuzzed_texts, piece_use
from cpt_jax.vocab.init_rows import Mean, Random, SubwordMean
from cpt_jax.vocab.merges import PairCounts
from cpt_jax.vocab.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    write_tokenizer(directory, english(300))
    return directory


@pytest.fixture(
    scope="module", params=[ContinuedBPE(new_tokens=60), Union(new_tokens=60)], ids=["continued-bpe", "union"]
)
def grown(request, base, tmp_path_factory):
    out = tmp_path_factory.mktemp("grown") / "tokenizer"
    extend(base, request.param, chinese(400), english(300), out)
    return Tokenizer(base), Tokenizer(out)


def naive_merges(words: list[list[int]], weights: list[int], count: int, first_id: int):
    """Byte-pair learning written plainly: count all pairs, merge the most frequent (ties: lowest ids), again."""
    words = [list(word) for word in words]
    learnt = []
    for new in range(first_id, first_id + count):
        pairs = collections.Counter()
        for word, weight in zip(words, weights, strict=True):
            for pair in itertools.pairwise(word):
                pairs[pair] += weight
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learnt.append((best, pairs[best]))
        for word in words:
            index = 0
            while index < len(word) - 1:
                if (word[index], word[index + 1]) == best:
                    word[index : index + 2] = [new]
                index += 1
    return learnt, words


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=14), min_size=1, max_size=6), st.data())
def test_incremental_counts_are_those_of_counting_anew(words, data):
    weights = [data.draw(st.integers(1, 3)) for _ in words]
    expected, _ = naive_merges(words, weights, 6, 10)
    pairs = PairCounts(words, weights)
    for new, (pair, count) in enumerate(expected, start=10):
        found = pairs.most_frequent(lambda _: True)
        assert found is not None
        # Pairs of one token (a a) are counted as overlapping by both.
        assert found == (pair, count)
        pairs.merge(pair, new)


def test_ids_of_the_base_keep_their_meaning(grown):
    base, extended = grown
    before, after = base.backend.get_vocab(), extended.backend.get_vocab()
    assert all(after[piece] == index for piece, index in before.items())
    assert extended.size == base.size + 60
    assert sorted(after.values()) == list(range(extended.size))


def test_protected_text_is_tokenised_as_before(grown):
    base, extended = grown
    texts = english(300)
    assert base.encode_documents(texts) == extended.encode_documents(texts)


def test_every_text_comes_back(grown):
    _, extended = grown
    for text in chinese(200, seed=9) + english(200, seed=9) + fuzzed_texts(500, seed=9):
        assert extended.decode(extended.encode(text)) == text


def test_new_text_takes_fewer_tokens(grown):
    base, extended = grown
    rates = compare("zh", base, extended, chinese(100, seed=5))
    assert rates["extended"]["tokens_per_character"] < 0.5 * rates["base"]["tokens_per_character"]
    assert rates["documents_changed"] == 1.0


def test_transformers_reads_it_alike(grown):
    from transformers import AutoTokenizer

    _, extended = grown
    reference = AutoTokenizer.from_pretrained(extended.directory)
    assert len(reference) == extended.size
    for text in chinese(20, seed=3) + english(20, seed=3):
        assert reference(text, add_special_tokens=False)["input_ids"] == extended.encode(text)


def test_a_new_piece_is_its_old_pieces(grown):
    base, extended = grown
    table = {index: piece for piece, index in extended.backend.get_vocab().items()}
    for offset, ids in enumerate(old_segmentation(base, extended)):
        assert "".join(table[index] for index in ids) == table[base.size + offset]
        assert max(ids) < base.size
        assert len(ids) >= 2


def test_merges_never_join_what_stands_together_in_old_text(base, tmp_path):
    texts = ["zzqq zzqq zzqq"] * 50
    with pytest.raises(UserError, match="nothing in the corpus is worth adding"):
        extend(base, ContinuedBPE(new_tokens=5), texts, texts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pieces_keep_to_the_length_asked_for(base, tmp_path):
    extend(base, ContinuedBPE(new_tokens=60, max_piece_characters=2), chinese(400), [], tmp_path / "out")
    extended = Tokenizer(tmp_path / "out")
    pieces = [piece for piece, index in extended.backend.get_vocab().items() if index >= Tokenizer(base).size]
    assert max(map(byte_characters, pieces)) == 2


def test_the_gate_names_the_figure(grown):
    base, extended = grown
    use = piece_use(base, extended, chinese(400))
    assert use.new_pieces == 60
    good = [compare("en", base, extended, english(50))]
    check(base, extended, good, ["en"], use, Limits(unreachable_pieces=1.0))
    changed = [compare("en", base, extended, chinese(50))]
    with pytest.raises(UserError, match=r"100\.0% of the old documents \(en\)"):
        check(base, extended, changed, ["en"], use, Limits(unreachable_pieces=1.0))


def test_other_kinds_of_tokenizer_are_refused(tmp_path):
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(UserError, match="WordPiece"):
        extend(tmp_path, ContinuedBPE(new_tokens=5), ["a"], [], tmp_path / "out")


def test_adjacent_pairs_are_those_of_the_base(base):
    tokenizer = Tokenizer(base)
    ids = tokenizer.encode("xyzzy")
    assert adjacent_pairs(tokenizer, ["xyzzy"]) == set(itertools.pairwise(ids))


def test_initial_rows(grown):
    import numpy as np

    base, extended = grown
    generator = np.random.default_rng(0)
    table = (generator.normal(0, 1, (base.size, 8)) @ np.diag(np.arange(1, 9)) + 3).astype(np.float32)
    pieces = old_segmentation(base, extended)
    mean = SubwordMean().build(table, pieces, 0)
    np.testing.assert_allclose(mean[0], table[pieces[0]].mean(0), rtol=1e-6)
    np.testing.assert_allclose(Mean().build(table, pieces, 0)[5], table.mean(0), rtol=1e-5)
    many = Random().build(table, [[0]] * 20_000, 0)
    np.testing.assert_allclose(np.cov(many, rowvar=False), np.cov(table, rowvar=False), rtol=0.1, atol=1.5)
    first = SubwordMean(weights="first").build(table, [[1, 2]], 0)[0]
    np.testing.assert_allclose(first, (2 * table[1] + table[2]) / 3, rtol=1e-6)


@pytest.mark.slow
def test_the_real_tokenizer_on_real_statutes(smollm2, tmp_path):
    """2,000 pieces: 0.70 tokens per character or less on held-out laws, English as before, and every text comes back."""
    from configs.quickstart import quickstart
    from cpt_jax.data.sources import SkipCounts, read

    statutes, english_domain, _ = quickstart().domains
    documents = list(read(statutes.corpus, SkipCounts()))
    learnt = [document.text for document in documents if not statutes.heldout.holds_out(document)]
    held = [document.text for document in documents if statutes.heldout.holds_out(document)]
    passages = list(read(english_domain.corpus, SkipCounts()))
    protected = [document.text for document in passages if not english_domain.heldout.holds_out(document)]
    old = [document.text for document in passages if english_domain.heldout.holds_out(document)]
    extend(smollm2, ContinuedBPE(new_tokens=2000), learnt, protected, tmp_path / "out")
    base, extended = Tokenizer(smollm2), Tokenizer(tmp_path / "out")
    rates = compare("statutes", base, extended, held)
    assert rates["extended"]["tokens_per_character"] < 0.70 < 1.75 < rates["base"]["tokens_per_character"]
    assert base.encode_documents(old) == extended.encode_documents(old)
    for text in [*held[:1000], *old]:
        assert extended.decode(extended.encode(text)) == text
    # This base has no token for some bytes of the rarest planes: there the extended tokenizer is as it is.
    for text in fuzzed_texts(2000, seed=3):
        assert extended.decode(extended.encode(text)) == base.decode(base.encode(text))
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in held[:100]:
        assert reference(text, add_special_tokens=False)["input_ids"] == extended.encode(text)
