"""A tokenizer's pieces as they are shown, and what they stand for."""

import pytest
from inputs import chinese, english

from cpt_jax.vocab.gate import fuzzed_texts
from cpt_jax.vocab.tokenizer import Tokenizer


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "llama3", "bpe"])
def test_the_bytes_of_pieces_are_those_of_the_text(bases, kind):
    tokenizer = Tokenizer(bases[kind])
    for text in [*chinese(20), *english(20), "国\ufffd <0xE6> \\xe6", *fuzzed_texts(100)]:
        ids = tokenizer.encode(text)
        # SentencePiece puts a space before a text.
        spelt = b"".join(map(tokenizer.piece_bytes, ids)).removeprefix(b" " if kind == "bpe" else b"")
        assert spelt == tokenizer.decode(ids).encode().removeprefix(b" " if kind == "bpe" else b"")


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_a_part_of_a_character_is_shown_as_its_bytes(bases, kind):
    tokenizer = Tokenizer(bases[kind])
    ids = tokenizer.encode("法")[kind == "bpe" :]
    assert [tokenizer.piece(index) for index in ids] == ["<0xE6>", "<0xB3>", "<0x95>"]
    assert not any("\ufffd" in tokenizer.piece(index) for index in range(tokenizer.size))
