"""A base's words and tokens as merge learning sees them are those that the base itself makes."""

import pytest
import tokenizers
from inputs import chinese, english

from cpt_jax.core.errors import UserError
from cpt_jax.vocab.gate import fuzzed_texts
from cpt_jax.vocab.segmentation import ByteLevel, CharacterBPE, kind_of, segmentation_of
from cpt_jax.vocab.tokenizer import Tokenizer, byte_alphabet

TEXTS = chinese(30) + english(30) + ["  two  spaces 国 12", ""] + fuzzed_texts(200)


def test_the_alphabet_is_that_of_tokenizers():
    alphabet = byte_alphabet()
    assert set(alphabet) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    for text in TEXTS:
        spelt = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        assert bytes(alphabet[c] for part, _ in spelt for c in part) == text.encode()


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "llama3"])
def test_tokens_of_the_words_are_the_tokens_of_the_text(bases, kind):
    base = Tokenizer(bases[kind])
    seen = segmentation_of(base)
    assert isinstance(seen, ByteLevel)
    for text in TEXTS:
        words = seen.words([text])
        segments = dict(zip(words, seen.segments(words), strict=True))
        count = sum(times * len(segments[word]) for word, times in words.items())
        ids = base.encode(text)
        assert count == len(ids)
        assert {index for word in segments.values() for index in word} == set(ids)


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_added_tokens_are_no_part_of_words(bases, tmp_path, kind):
    base = Tokenizer(bases[kind]).backend
    base.add_tokens([tokenizers.AddedToken(" " * count, normalized=False) for count in range(8, 1, -1)])
    base.save(str(tmp_path / "tokenizer.json"))
    base = Tokenizer(tmp_path)
    seen = segmentation_of(base)
    added = {index for index in range(base.size) if base.piece(index).isspace() and len(base.piece(index)) > 1}
    assert len(added) == 7
    for text in ("the   river      city", *english(20)):
        words = seen.words([text])
        segments = dict(zip(words, seen.segments(words), strict=True))
        found = {index for word in segments.values() for index in word}
        assert found == set(base.encode(text)) - added


def test_characters_that_are_no_pieces_are_tokens_of_their_own(bases):
    base = Tokenizer(bases["bpe"])
    seen = segmentation_of(base)
    assert isinstance(seen, CharacterBPE)
    (ids,) = seen.segments(["▁the国务国"])
    assert [seen.pieces[index] for index in ids] == ["▁the", "国", "务", "国"]
    assert ids[1] == ids[3] >= seen.unknown
    assert seen.words(["the the 国"]) == {"▁the": 2, "▁国": 1}


@pytest.mark.parametrize("piece", ["▁国务", "国かカ", "▁the", "。，", "▁", "река"])
def test_letters_of_one_script_join(bases, piece):
    assert segmentation_of(Tokenizer(bases["bpe"])).joins(piece)


@pytest.mark.parametrize("piece", ["国a", "a国", "国。", "12", "a1", "a▁b", "aя"])
def test_scripts_digits_and_words_do_not_mix(bases, piece):
    assert not segmentation_of(Tokenizer(bases["bpe"])).joins(piece)


def test_single_characters_that_are_digits_may_be_pieces(bases):
    assert segmentation_of(Tokenizer(bases["bpe"])).joins("７")


def test_a_piece_of_broken_characters_counts_those_that_begin_in_it(bases):
    seen = segmentation_of(Tokenizer(bases["gpt2"]))
    spelt = {byte: character for character, byte in byte_alphabet().items()}
    piece = "".join(spelt[byte] for byte in "务国务".encode()[2:-2])
    assert seen.text(piece) == "国"
    assert seen.characters(piece) == 2


def test_kinds_are_told_apart(bases):
    found = {name: kind_of(Tokenizer(path)) for name, path in bases.items()}
    expected = dict.fromkeys(("gpt2", "qwen", "llama3"), "byte-level")
    assert found == expected | {"bpe": "characters", "unigram": "unigram"}


@pytest.mark.parametrize("model", ["WordLevel", "BPE"])
def test_kinds_that_cannot_be_extended_are_refused(tmp_path, model):
    """A BPE over characters without byte fallback cannot spell what it does not know."""
    made = getattr(tokenizers.models, model)({"a": 0, "[UNK]": 1}, **({} if model == "WordLevel" else {"merges": []}))
    tokenizers.Tokenizer(made).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=f"kind {model} cannot be extended"):
        kind_of(Tokenizer(tmp_path))
