"""tokenizer.model: read as SentencePiece reads it, and written with more pieces."""

import numpy as np
import pytest
import tokenizers
from inputs import chinese, english, write_sentencepiece
from sentencepiece import SentencePieceProcessor
from sentencepiece_inputs import TEXTS

from cpt_jax.core.errors import UserError
from cpt_jax.vocab.extend import Union, extend
from cpt_jax.vocab.sentencepiece_model import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    append_pieces,
    extended_merges,
    fast_tokenizer,
    processor,
    read_model,
    scores_below,
    settings_of,
)
from cpt_jax.vocab.tokenizer import Tokenizer


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_base_without_tokenizer_json_is_read_as_sentencepiece_reads_it(bases, kind):
    base, reference = Tokenizer(bases[kind]), SentencePieceProcessor(model_file=str(bases[kind] / "tokenizer.model"))
    assert base.size == reference.get_piece_size()
    assert base.encode_documents(TEXTS) == reference.encode(TEXTS)


@pytest.mark.parametrize(
    "options",
    [
        dict(add_dummy_prefix=False),
        dict(remove_extra_whitespaces=True, normalization_rule_name="nmt_nfkc"),
        dict(user_defined_symbols=["<sep>", "国务院"], control_symbols=["<pad>"], add_dummy_prefix=False),
    ],
    ids=["no dummy prefix", "nmt_nfkc", "own symbols"],
)
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_other_settings_are_read_as_sentencepiece_reads_them(tmp_path, kind, options):
    # Texts about line breaks and the user's own symbols, but none of the characters that NFKC composes anew.
    texts = [*chinese(50), *english(50), "  the   city ", "the <sep> city<sep>国务院", "ｆｕｌｌ　ｗｉｄｔｈ ①"]
    write_sentencepiece(tmp_path / "base", english(300), kind, 300 if kind == "bpe" else 290, **options)
    extend(tmp_path / "base", Union(new_tokens=60, scores="below-base"), chinese(100), english(100), tmp_path / "out")
    for directory in (tmp_path / "base", tmp_path / "out"):
        reference = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        tokenizer, ids = Tokenizer(directory), reference.encode(texts)
        assert tokenizer.encode_documents(texts) == ids
        if "add_dummy_prefix" in options:
            # A space that nobody put there is the text's.
            assert tokenizer.decode(tokenizer.encode(" the city")) == " the city"


def test_runs_of_spaces_of_one_score_are_cut_as_sentencepiece_cuts_them(bases):
    proto = read_model(bases["bpe"] / "tokenizer.model")
    runs = [("\u2581" * count, -1e9) for count in (4, 2, 8, 3, 6)]
    proto = append_pieces(proto, [], runs)
    tokenizer = tokenizers.Tokenizer.from_str(fast_tokenizer(proto))
    texts = [" " * count + "the" for count in range(20)]
    found = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert found == processor(proto).encode(texts)
    below = np.float32(scores_below(proto, 3))
    assert -1e9 > below[0] > below[1] > below[2]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_unknown_characters_in_a_row_are_one_unknown_token(tmp_path, kind):
    write_sentencepiece(tmp_path, english(300), kind, 100, byte_fallback=False)
    proto = read_model(tmp_path / "tokenizer.model")
    texts = ["the 国务院 city", "国务院国务院", "国 务 院"]
    found = tokenizers.Tokenizer.from_str(fast_tokenizer(proto)).encode_batch(texts, add_special_tokens=False)
    assert [encoding.ids for encoding in found] == processor(proto).encode(texts)


def test_added_tokens_keep_their_ids_whatever_their_order_and_gaps(bases):
    proto = read_model(bases["bpe"] / "tokenizer.model")
    size = len(proto.pieces)
    added = [(size + 3, "<b>", False), (size + 1, "<a>", True), (0, "<unk>", True)]
    tokens = [dict(id=index, content=name, special=special) for index, name, special in added]
    grown = append_pieces(proto, tokens, [("新", -9.0)])
    assert [(piece.piece, piece.type) for piece in list(grown.pieces)[size:]] == [
        (f"<unused{size}>", CONTROL),
        ("<a>", CONTROL),
        (f"<unused{size + 2}>", CONTROL),
        ("<b>", USER_DEFINED),
        ("新", NORMAL),
    ]
    assert grown.trainer_spec.vocab_size == size + 5


def test_new_merges_stand_behind_those_of_the_same_score_and_a_part_of_an_old_piece_behind_the_old_merge(bases):
    proto = append_pieces(read_model(bases["bpe"] / "tokenizer.model"), [], [("QR", -1.5), ("ST", -2.5)])
    old = [("Q", "R"), ("S", "T")]
    found = extended_merges(old, [*"QRST", "QR", "ST"], ["XY"], [-1.5], proto)
    assert found == old
    found = extended_merges(old, [*"QRSTXY", "QR", "ST"], ["XY"], [-1.5], proto)
    assert found == [("Q", "R"), ("X", "Y"), ("S", "T")]
    old = [("Q", "R"), ("QR", "S")]
    assert extended_merges(old, [*"QRS", "QR", "QRS"], ["RS"], None, None) == [*old, ("Q", "RS"), ("R", "S")]


def test_the_start_token_may_be_the_first_and_others_may_be_missing(bases):
    proto = read_model(bases["bpe"] / "tokenizer.model")
    settings = settings_of(proto)
    assert settings["bos_token"] == "<s>"
    proto.trainer_spec.bos_id, proto.trainer_spec.pad_id = 0, len(proto.pieces)
    assert "pad_token" not in settings_of(proto)
    assert tokenizers.Tokenizer.from_str(fast_tokenizer(proto)).encode("the").ids[0] == 0


def test_files_that_are_no_such_model_are_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="no SentencePiece"):
        Tokenizer(tmp_path)
    write_sentencepiece(tmp_path / "word", english(50), "word", 280)
    with pytest.raises(UserError, match="word and character models cannot be used"):
        Tokenizer(tmp_path / "word")
