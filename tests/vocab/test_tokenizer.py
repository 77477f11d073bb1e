"""A tokenizer's pieces as they are shown, and what they stand for."""

import json
import shutil

import pytest
import tokenizers
from inputs import chinese, english, write_sentencepiece

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


def test_a_length_that_a_file_cuts_and_fills_up_to_is_left_out(bases, tmp_path):
    """As of one that was saved by who trained on batches; transformers leaves them out too."""
    tokenizer = Tokenizer(bases["qwen"])
    shutil.copytree(bases["qwen"], tmp_path / "saved")
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "saved/tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding(length=8)
    saved.save(str(tmp_path / "saved/tokenizer.json"))
    found, text = Tokenizer(tmp_path / "saved"), "the old city lies by the river"
    assert len(found.encode(text)) > 8
    for texts in ([text], ["a"]):
        assert found.encode_documents(texts) == tokenizer.encode_documents(texts)
        assert [each.ids for each in found.encode_marked(texts)] == tokenizer.encode_documents(texts)
        assert [each.ids for each in found.encode_placed(texts)] == tokenizer.encode_documents(texts)
    assert found.fingerprint == tokenizer.fingerprint
    assert json.loads((tmp_path / "saved/tokenizer.json").read_text())["truncation"]


def test_what_stands_for_the_rest_is_known(bases, tmp_path):
    write_sentencepiece(tmp_path / "none", english(300), "unigram", 60, byte_fallback=False)
    tokenizer = Tokenizer(tmp_path / "none")
    assert tokenizer.unknown_id in tokenizer.encode("国务院")
    assert Tokenizer(bases["bpe"]).unknown_id not in Tokenizer(bases["bpe"]).encode("国务院")
    assert Tokenizer(bases["gpt2"]).unknown_id is None
