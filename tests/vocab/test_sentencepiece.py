"""tokenizer.model extended: it and its tokenizer.json are one tokenizer, and old text is cut as the scores say."""

import collections
import itertools
import json
import math
import shutil

import pytest
import tokenizers
from inputs import ENGLISH, chinese, compounds, english, write_sentencepiece
from sentencepiece import SentencePieceProcessor
from sentencepiece_inputs import TEXTS

from cpt_jax.core.errors import UserError
from cpt_jax.vocab.extend import ContinuedBPE, Union, extend, old_segmentation
from cpt_jax.vocab.fertility import compare
from cpt_jax.vocab.sentencepiece_model import (
    NORMAL,
    fast_tokenizer,
    processor,
    read_model,
)
from cpt_jax.vocab.tokenizer import Tokenizer

EXTENSIONS = {
    "continued-bpe": ContinuedBPE(new_tokens=60),
    "below-base": Union(new_tokens=60, scores="below-base"),
    "own": Union(new_tokens=60, scores="own"),
    "zero": Union(new_tokens=60, scores="zero"),
}
# A unigram has no merges to go on from. Pieces that all have the score 0 tie: see the test of "zero".
AGREEING = [("bpe", "continued-bpe"), ("bpe", "below-base"), ("bpe", "own")] + [
    ("unigram", scores) for scores in ("below-base", "own", "zero")
]


@pytest.fixture(scope="module", params=list(itertools.product(["zh", "compounds"], AGREEING)), ids=str)
def grown(request, bases, tmp_path_factory):
    """(base, extended), the text one that shares no letter with the base's, or all of them."""
    domain, (kind, name) = request.param
    out = tmp_path_factory.mktemp("grown") / "tokenizer"
    texts = chinese(400) if domain == "zh" else compounds(400)
    extend(bases[kind], EXTENSIONS[name], texts, english(300), out)
    return Tokenizer(bases[kind]), Tokenizer(out)


def test_both_files_are_one_tokenizer(grown):
    _, extended = grown
    reference = SentencePieceProcessor(model_file=str(extended.directory / "tokenizer.model"))
    assert reference.get_piece_size() == extended.size
    for index in range(extended.size):
        assert reference.id_to_piece(index) == extended.backend.id_to_token(index)
    assert extended.encode_documents(TEXTS) == reference.encode(TEXTS)
    for text in TEXTS:
        assert extended.decode(extended.encode(text)) == reference.decode(reference.encode(text))


def test_transformers_agrees_fast_and_slow(grown):
    from transformers import AutoTokenizer
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    _, extended = grown
    fast = AutoTokenizer.from_pretrained(extended.directory)
    # What is left of slow tokenizers in transformers 5.
    slow = SentencePieceBackend(
        vocab_file=str(extended.directory / "tokenizer.model"), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    assert len(fast) == len(slow) == extended.size
    for text in TEXTS:
        ids = extended.encode(text)
        assert fast(text, add_special_tokens=False)["input_ids"] == ids
        assert slow(text, add_special_tokens=False)["input_ids"] == ids


# Not "own": where scores are not in the order of ids, transformers' reading of the file is not SentencePiece's.
@pytest.mark.parametrize("name", ["continued-bpe", "below-base"])
def test_transformers_makes_the_same_merges_from_tokenizer_model(bases, tmp_path, name):
    from transformers import AutoTokenizer

    extend(bases["bpe"], EXTENSIONS[name], chinese(200) + compounds(200), [], tmp_path / "out")
    (tmp_path / "llama").mkdir()
    shutil.copyfile(tmp_path / "out/tokenizer.model", tmp_path / "llama/tokenizer.model")
    (tmp_path / "llama/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    reference = AutoTokenizer.from_pretrained(tmp_path / "llama")
    extended = Tokenizer(tmp_path / "out")
    for text in chinese(100, seed=3) + english(100, seed=3) + compounds(100, seed=3):
        assert reference(text, add_special_tokens=False)["input_ids"] == extended.encode(text)


def test_ids_of_the_base_keep_their_meaning(grown):
    base, extended = grown
    before, after = base.sentencepiece.pieces, extended.sentencepiece.pieces
    assert list(after[: len(before)]) == list(before)
    assert len(after) == len(before) + 60
    vocabulary = extended.backend.get_vocab()
    assert all(vocabulary[piece] == index for piece, index in base.backend.get_vocab().items())
    assert {piece.type for piece in after[len(before) :]} == {NORMAL}


def test_every_text_that_came_back_comes_back(grown):
    base, extended = grown
    for text in TEXTS:
        if base.decode(base.encode(text)) == text:
            assert extended.decode(extended.encode(text)) == text


def test_new_text_takes_fewer_tokens(grown):
    base, extended = grown
    learnt_chinese = any("国" in extended.piece(index) for index in range(base.size, extended.size))
    rates = compare("new", base, extended, (chinese if learnt_chinese else compounds)(100, seed=5))
    assert rates["extended"]["tokens_per_character"] < 0.75 * rates["base"]["tokens_per_character"]


def test_a_new_piece_is_its_old_pieces(grown):
    base, extended = grown
    segmented = old_segmentation(base, extended)
    assert len(segmented) == 60
    for offset, ids in enumerate(segmented):
        assert max(ids) < base.size
        # Without the normalizer, which would put a space before it: bytes that spell characters are joined.
        assert base.backend.decode(ids) == extended.backend.decode([base.size + offset])


def whole_words(base: Tokenizer) -> list[str]:
    """Words of the old text that are one piece of the base."""
    words = [word for word in ENGLISH if len(base.encode(word)) == 1]
    assert words
    return words


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_below_base_leaves_what_the_base_has_in_one_piece_and_zero_does_not(bases, tmp_path, kind):
    base = Tokenizer(bases[kind])
    texts = [" ".join(order) for order in itertools.islice(itertools.permutations(whole_words(base)), 200)]
    changed = {}
    for scores in ("below-base", "own", "zero"):
        extend(bases[kind], Union(new_tokens=60, scores=scores), compounds(400), [], tmp_path / scores)
        extended = processor(Tokenizer(tmp_path / scores).sentencepiece)
        changed[scores] = sum(a != b for a, b in zip(base.encode_documents(texts), extended.encode(texts), strict=True))
    assert changed["below-base"] == 0
    assert changed["zero"] >= changed["own"] >= changed["below-base"]
    assert kind == "unigram" or changed["zero"] > 0


def test_scores_are_those_that_the_policy_names(bases, tmp_path):
    scores = {}
    for kind, policy in itertools.product(("bpe", "unigram"), ("below-base", "own", "zero")):
        extend(bases[kind], Union(new_tokens=30, scores=policy), compounds(300), [], tmp_path / kind / policy)
        base, extended = (
            read_model(bases[kind] / "tokenizer.model"),
            read_model(tmp_path / kind / policy / "tokenizer.model"),
        )
        old = [piece.score for piece in base.pieces if piece.type == NORMAL]
        scores[kind, policy] = [piece.score for piece in extended.pieces[len(base.pieces) :]]
        if policy == "below-base":
            assert max(scores[kind, policy]) < min(old)
        if policy == "zero":
            assert set(scores[kind, policy]) == {0.0}
        # The best of the domain first, and none twice.
        if policy != "zero":
            assert all(a > b for a, b in itertools.pairwise(scores[kind, policy]))
    # A place in the order of learning, as those of the base, and never the same as one of those.
    assert all(score % 1 == 0.5 for score in scores["bpe", "own"])
    # The logarithm of a probability.
    assert all(math.log(1e-9) < score < 0 for score in scores["unigram", "own"])


def test_continued_bpe_leaves_protected_text_as_it_is(bases, tmp_path):
    protected = english(300)
    extend(bases["bpe"], ContinuedBPE(new_tokens=100), compounds(400) + chinese(400), protected, tmp_path / "out")
    base, extended = Tokenizer(bases["bpe"]), Tokenizer(tmp_path / "out")
    assert base.encode_documents(protected) == extended.encode_documents(protected)
    assert extended.encode_documents(compounds(50)) != base.encode_documents(compounds(50))


@pytest.mark.parametrize("frequency", [1, 2, 40])
def test_every_continued_piece_is_used_as_often_as_asked(bases, tmp_path, frequency):
    texts = chinese(300) + compounds(100)
    done = extend(bases["bpe"], ContinuedBPE(new_tokens=300, min_frequency=frequency), texts, [], tmp_path / "out")
    base, extended = Tokenizer(bases["bpe"]), Tokenizer(tmp_path / "out")
    counts = collections.Counter(index for ids in extended.encode_documents(texts) for index in ids)
    rare = [extended.piece(i) for i in range(base.size, extended.size) if counts[i] < frequency]
    assert done.new_pieces > 20
    assert rare == []


def test_merge_learning_of_a_unigram_is_refused_with_what_works(bases, tmp_path):
    with pytest.raises(UserError, match="unigram tokenizer has no merges to go on from: use --method union"):
        extend(bases["unigram"], ContinuedBPE(new_tokens=5), chinese(50), [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("frequency", [2, 30])
def test_every_union_piece_stands_in_the_text_as_often_as_asked(bases, tmp_path, kind, frequency):
    texts = chinese(60) + compounds(20)
    extend(bases[kind], Union(new_tokens=200, min_frequency=frequency), texts, [], tmp_path / "out")
    base, extended = Tokenizer(bases[kind]), Tokenizer(tmp_path / "out")
    spelt = "\n".join("▁" + text.replace(" ", "▁") for text in texts)
    new = [extended.backend.id_to_token(index) for index in range(base.size, extended.size)]
    assert new
    assert [piece for piece in new if spelt.count(piece) < frequency] == []


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_nothing_worth_adding_is_told_and_nothing_written(bases, tmp_path, kind):
    with pytest.raises(UserError, match="nothing in the corpus is worth adding"):
        extend(bases[kind], Union(new_tokens=5), ["国务院"], [], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("scores", ["below-base", "own"])
def test_dropping_unreachable_pieces_keeps_what_leads_to_others(bases, tmp_path, kind, scores):
    texts, extension = chinese(200) + compounds(200), Union(new_tokens=120, scores=scores)
    whole = extend(bases[kind], extension, texts, [], tmp_path / "whole")
    fewer = extend(bases[kind], extension, texts, [], tmp_path / "fewer", drop_unreachable=True)
    assert fewer.dropped > 0
    assert fewer.new_pieces + fewer.dropped == whole.new_pieces
    one, two = Tokenizer(tmp_path / "whole"), Tokenizer(tmp_path / "fewer")
    for text in texts:
        tokens = [tokenizer.backend.encode(text, add_special_tokens=False).tokens for tokenizer in (one, two)]
        assert tokens[0] == tokens[1]
    assert processor(two.sentencepiece).encode(TEXTS) == two.encode_documents(TEXTS)
    if kind == "unigram":
        seen = {index for ids in two.encode_documents(texts) for index in ids}
        assert seen >= set(range(Tokenizer(bases[kind]).size, two.size))


@pytest.mark.parametrize("name", ["continued-bpe", "below-base"])
def test_added_tokens_behind_the_vocabulary_keep_their_ids(bases, tmp_path, name):
    """A chat model's directory: tokenizer.model, and a tokenizer.json with more tokens behind its pieces."""

    base = tmp_path / "base"
    shutil.copytree(bases["bpe"], base)
    chat = tokenizers.Tokenizer.from_str(fast_tokenizer(read_model(base / "tokenizer.model")))
    size = chat.get_vocab_size()
    chat.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    chat.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    chat.save(str(base / "tokenizer.json"))
    extend(base, EXTENSIONS[name], chinese(200), english(100), tmp_path / "out")
    extended = Tokenizer(tmp_path / "out")
    reference = processor(extended.sentencepiece)
    assert extended.size == reference.get_piece_size() == size + 3 + 60
    for index in range(extended.size):
        assert reference.id_to_piece(index) == extended.backend.id_to_token(index)
    assert [extended.backend.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>", "<think>")] == [
        size,
        size + 1,
        size + 2,
    ]
    assert size in extended.encode_marked(["<|im_start|>国务院<|im_end|>"])[0].ids
    assert extended.encode_documents(TEXTS) == reference.encode(TEXTS)


def test_the_trainer_keeps_to_the_bases_settings(bases, tmp_path):
    texts = ["2024年 国务院 12345 abc国务院"] * 200 + chinese(200)
    extend(bases["bpe"], Union(new_tokens=80, max_piece_characters=3), texts, [], tmp_path / "out")
    base, extended = Tokenizer(bases["bpe"]), Tokenizer(tmp_path / "out")
    new = [extended.backend.id_to_token(index) for index in range(base.size, extended.size)]
    assert not [piece for piece in new if len(piece) > 1 and any(c.isdigit() for c in piece)]
    assert max(map(len, new)) == 3


def test_the_same_text_gives_the_same_files(bases, tmp_path):
    for kind, name in [*AGREEING, ("bpe", "zero")]:
        for turn in ("first", "second"):
            extend(bases[kind], EXTENSIONS[name], chinese(200), english(100), tmp_path / kind / name / turn)
        for file in ("tokenizer.model", "tokenizer.json"):
            first, second = ((tmp_path / kind / name / turn / file).read_bytes() for turn in ("first", "second"))
            assert first == second


def test_new_pieces_come_after_runs_of_spaces(tmp_path):
    # Mistral's runs of spaces have the score -1e9, far below all else: a piece that begins with a space must not take
    # one from them.
    write_sentencepiece(tmp_path / "base", english(300), "bpe", 300)
    proto = read_model(tmp_path / "base" / "tokenizer.model")
    for run in ("▁▁", "▁▁▁▁"):
        proto.pieces.add(piece=run, score=-1e9, type=NORMAL)
    (tmp_path / "base" / "tokenizer.model").write_bytes(proto.SerializeToString())
    (tmp_path / "base" / "tokenizer.json").unlink(missing_ok=True)
    extend(tmp_path / "base", Union(new_tokens=20), [f"{index} 法律的" for index in range(50)], [], tmp_path / "out")
    extended, texts = Tokenizer(tmp_path / "out"), ["   法律的", "法律的    法律的 x", "     法律的   法律的"]
    reference = SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    encoded = extended.encode_documents(texts)
    assert encoded == reference.encode(texts)
    assert any(extended.piece(index) == " 法律的" for index in range(Tokenizer(tmp_path / "base").size, extended.size))
    assert extended.backend.id_to_token(encoded[0][0]) == "▁▁▁▁"
