"""The tokenizers of GGUF files, against transformers and sentencepiece."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers
from gguf_files import TEXTS, import_tokenizer, sentencepiece_pairs, tokenizer_pairs
from inputs import english, write_sentencepiece, write_tokenizer
from sentencepiece import SentencePieceProcessor
from tokenizers import pre_tokenizers

from cpt_jax.checkpoint.gguf import read_gguf
from cpt_jax.checkpoint.gguf_write import export_gguf
from cpt_jax.vocab.sentencepiece_model import CONTROL, SPACE, UNKNOWN, USER_DEFINED, read_model


@pytest.mark.parametrize(
    ("pre", "written"),
    [
        ("gpt-2", "gpt2"),
        ("smollm", "gpt2"),
        ("refact", "gpt2"),
        ("qwen2", "qwen"),
        ("llama-bpe", "qwen"),
        ("llama-bpe", "gpt2"),
        ("dbrx", "gpt2"),
        ("smaug-bpe", "qwen"),
    ],
)
def test_byte_level_tokens_are_those_of_transformers(tmp_path, pre, written):
    write_tokenizer(tmp_path / "tokenizer", TEXTS, 600, written)
    pairs = tokenizer_pairs(tmp_path / "tokenizer", pre)
    out = import_tokenizer(tmp_path, pairs)
    ours = transformers.AutoTokenizer.from_pretrained(out)
    written_file = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    if pre == "qwen2":
        document = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
        merges = [tuple(merge) for merge in document["model"]["merges"]]
        reference = transformers.Qwen2Tokenizer(vocab=document["model"]["vocab"], merges=merges)
        for token in document["added_tokens"]:
            entry = tokenizers.AddedToken(token["content"], normalized=False, special=token["special"])
            reference.add_tokens([entry], special_tokens=token["special"])
    else:
        reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    if pre in ("smollm", "refact"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False)])
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text, add_special_tokens=False), text
        # transformers may build the tokenizer of a known model anew: tokenizer.json has to say the same.
        assert ids == written_file.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids) == (text if pre != "qwen2" else ours.backend_tokenizer.normalizer.normalize_str(text))
    size = len(pairs["tokenizer.ggml.tokens"])
    assert len(ours) == size - 2, "fillers are no tokens"
    assert ours.convert_ids_to_tokens(list(range(size - 2))) == pairs["tokenizer.ggml.tokens"][:-2]
    assert (ours.bos_token, ours.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert ours.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<|im_start|>Hi<|im_end|>"


def test_a_word_that_is_a_piece_is_that_piece_in_llama_3(tmp_path):
    write_tokenizer(tmp_path / "tokenizer", TEXTS, 600)
    pairs = tokenizer_pairs(tmp_path / "tokenizer", "llama-bpe")
    pieces = pairs["tokenizer.ggml.tokens"]
    pieces[pieces.index(f"[PAD{len(pieces) - 2}]")] = "Ġzqzq"
    pairs["tokenizer.ggml.token_type"][len(pieces) - 2] = 1
    ours = transformers.AutoTokenizer.from_pretrained(import_tokenizer(tmp_path, pairs))
    assert ours.encode(" zqzq", add_special_tokens=False) == [len(pieces) - 2]


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "sentencepiece"])
@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, False, None])
def test_bos_and_eos_are_added_as_the_file_says(tmp_path, pre, bos, eos):
    if pre == "sentencepiece":
        write_sentencepiece(tmp_path / "tokenizer", english(200), "bpe", 400)
        pairs = sentencepiece_pairs(tmp_path / "tokenizer")
    else:
        write_tokenizer(tmp_path / "tokenizer", english(50), 300)
        pairs = tokenizer_pairs(tmp_path / "tokenizer", pre)
    # How some converters write that there is no such token.
    pairs["tokenizer.ggml.padding_token_id"] = 2**32 - 1
    pairs |= {} if bos is None else {"tokenizer.ggml.add_bos_token": bos}
    pairs |= {} if eos is None else {"tokenizer.ggml.add_eos_token": eos}
    ours = transformers.AutoTokenizer.from_pretrained(import_tokenizer(tmp_path, pairs))
    bos = pre != "gpt-2" if bos is None else bos
    plain = ours.encode("the city", add_special_tokens=False)
    assert ours.encode("the city") == [ours.bos_token_id] * bos + plain + [ours.eos_token_id] * bool(eos)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["add_bos_token"], settings["add_eos_token"]) == (bos, bool(eos))
    assert "pad_token" not in settings


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("digits", [True, False])
def test_a_sentencepiece_tokenizer_comes_back(tmp_path, prefix, digits):
    texts = [*TEXTS[:-1], *english(200), "2024 2024 2024 1999 1999 12 12 12"] * 2
    write_sentencepiece(tmp_path / "tokenizer", texts, "bpe", 700, add_dummy_prefix=prefix, split_digits=digits)
    pairs = sentencepiece_pairs(tmp_path / "tokenizer") | {"tokenizer.ggml.add_space_prefix": prefix}
    out = import_tokenizer(tmp_path, pairs)
    before, after = (read_model(path / "tokenizer.model") for path in (tmp_path / "tokenizer", out))
    for piece, expected in zip(after.pieces[:-1], before.pieces, strict=True):
        assert (piece.piece, piece.score, piece.type) == (expected.piece, expected.score, expected.type)
    assert after.pieces[-1].piece == "<|im_end|>"
    for field in ("model_type", "byte_fallback", "split_digits", "bos_id", "eos_id", "unk_id", "pad_id"):
        assert getattr(after.trainer_spec, field) == getattr(before.trainer_spec, field), field
    original = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer" / "tokenizer.model"))
    written = SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    fast = transformers.AutoTokenizer.from_pretrained(out)
    for text in TEXTS[:-1]:
        assert written.encode(text) == original.encode(text)
        assert fast.encode(text, add_special_tokens=False) == original.encode(text), text
    assert fast.encode("a<|im_end|>", add_special_tokens=False)[-1] == len(before.pieces)
    assert (fast.bos_token, fast.eos_token, fast.unk_token) == ("<s>", "</s>", "<unk>")


def gemma_pairs(directory: Path) -> dict:
    """The key-value pairs of a tokenizer.model as Gemma's: runs of spaces and lines, tags, and tokens of chats are
    user-defined, which the converter writes with its own score, and as control tokens where they are special."""
    user = [SPACE * 2, SPACE * 3, SPACE * 4, "\n\n", "\n\n\n", "<b>", "<start_of_turn>"]
    settings = dict(user_defined_symbols=user, add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3)
    texts = [*english(200), "a  b   c    d     e\n\n\n\nf <b>"] * 2
    write_sentencepiece(directory, texts, "bpe", 700, **settings)
    pairs = sentencepiece_pairs(directory)
    pieces, scores, types = (pairs[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    for index, (piece, kind) in enumerate(zip(pieces, types, strict=True)):
        if kind == USER_DEFINED:
            pieces[index], scores[index] = piece.replace(SPACE, " "), -1000.0
        if kind == UNKNOWN or piece == "<start_of_turn>":
            types[index] = CONTROL
    ids = {f"tokenizer.ggml.{name}_token_id": n for n, name in enumerate(("padding", "eos", "bos", "unknown"))}
    return pairs | ids | {"tokenizer.ggml.add_space_prefix": False}


def test_user_defined_pieces_of_gemma_are_found_before_anything_is_merged(tmp_path):
    pairs = gemma_pairs(tmp_path / "tokenizer")
    original = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer" / "tokenizer.model"))
    out = import_tokenizer(tmp_path, pairs)
    written = SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    fast, start = transformers.AutoTokenizer.from_pretrained(out), original.piece_to_id("<start_of_turn>")
    for text in [*TEXTS[:-1], "a  b   c    d     e      f", "   x\n\n\n\n\ny  \n", "<b>the city</b>  \n\n"]:
        assert written.encode(text) == original.encode(text), text
        assert fast.encode(text, add_special_tokens=False) == original.encode(text), text
    assert fast.encode("<start_of_turn>the", add_special_tokens=False)[0] == start
    # Google's own says of no token that it is special, tokenizer.json does.
    shutil.copy(tmp_path / "tokenizer" / "tokenizer.model", out)
    export_gguf(out, tmp_path / "again.gguf")
    metadata, _ = read_gguf(tmp_path / "again.gguf")
    # The unknown token is written as what it is.
    pairs["tokenizer.ggml.token_type"][3] = UNKNOWN
    for name in ("tokens", "token_type", "scores", "add_space_prefix", "bos_token_id", "unknown_token_id"):
        end = -2 if name == "scores" else None
        read, expected = (each[f"tokenizer.ggml.{name}"] for each in (metadata, pairs))
        assert (read[:end] if isinstance(read, list) else read) == (
            expected[:end] if isinstance(read, list) else expected
        ), name
