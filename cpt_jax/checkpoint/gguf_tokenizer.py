"""The tokenizer of a GGUF file as Hugging Face files: byte-level BPE as tokenizer.json, SentencePiece as tokenizer.model
besides.

The keys are those of the GGUF specification (ggml-org/ggml, docs/gguf.md); what they leave open is as in llama.cpp's
src/llama-vocab.cpp, and the pre-tokenizers read as in the tokenizer.json of the models they are named after.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import write_bytes_atomic, write_json_atomic, write_text_atomic
from cpt_jax.vocab.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    ModelProto,
    fast_tokenizer,
    processor,
    sentencepiece_model_pb2,
)

# GGUF numbers the types of tokens as SentencePiece does; this one fills an embedding up to a round number of rows.
UNUSED = 5

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _split(digits: str) -> dict:
    """Splits words by GPT-4's pattern, with numbers cut into pieces of so many digits."""
    split = {"type": "Split", "pattern": {"Regex": _WORDS % digits}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL | {"use_regex": False}]}


# How a pre-tokenizer of llama.cpp's ("tokenizer.ggml.pre") reads in the `tokenizers` library.
PRE_TOKENIZERS: dict[str, dict] = {
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
    "gpt-2": _BYTE_LEVEL,
    "qwen2": _split(""),
    "llama-bpe": _split("{1,3}"),
    "dbrx": _split("{1,3}"),
}
# Other names of the same: of Granite 3 and StarCoder, and of SmolLM3.
PRE_TOKENIZERS |= dict.fromkeys(("refact", "starcoder"), PRE_TOKENIZERS["smollm"])
PRE_TOKENIZERS["smaug-bpe"] = PRE_TOKENIZERS["dbrx"]
# In Llama 3 a word that is a piece is that piece, whatever the merges make of it.
IGNORES_MERGES = ("llama-bpe",)
NORMALIZERS: dict[str, dict] = {"qwen2": {"type": "NFC"}}


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int | None]:
    """The ids of the special tokens by their Hugging Face names ("bos", "eos", "unk", "pad"), None where there is
    none."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    # A SentencePiece file need not say what every LLaMA has.
    defaults = {"unk": 0, "bos": 1, "eos": 2} if metadata.get("tokenizer.ggml.model") == "llama" else {}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id", defaults.get(name)) for name, key in keys.items()}
    # Some converters write "none" as -1, which reads as the largest unsigned number.
    size = len(metadata["tokenizer.ggml.tokens"])
    return {name: index if index is not None and 0 <= index < size else None for name, index in ids.items()}


def write_tokenizer(metadata: Mapping[str, Any], max_length: int, directory: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, for SentencePiece, tokenizer.model.

    Raises:
      UserError: a tokenizer or pre-tokenizer that is not supported.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    ids, pieces = special_ids(metadata), metadata["tokenizer.ggml.tokens"]
    if kind == "llama":
        proto = _sentencepiece(metadata, ids)
        write_bytes_atomic(directory / "tokenizer.model", proto.SerializeToString())
        tokenizer = json.loads(fast_tokenizer(proto))
    elif kind == "gpt2" and pre in PRE_TOKENIZERS:
        tokenizer = _byte_level(metadata, pre)
    elif kind == "gpt2":
        raise UserError(
            f"the GGUF file has the pre-tokenizer {pre!r}; supported: {', '.join(PRE_TOKENIZERS)}. Use the model's Hugging Face directory instead"
        )
    else:
        raise UserError(
            f"the GGUF file has a tokenizer of kind {kind!r}; supported: byte-level BPE ('gpt2') and SentencePiece BPE ('llama'). Use the model's Hugging Face directory instead"
        )
    # What llama.cpp takes where the file does not say.
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre == "llama-bpe")
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    tokenizer["post_processor"] = _post_processor(
        pieces, ids["bos"] if add_bos else None, ids["eos"] if add_eos else None
    )
    write_text_atomic(directory / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False, indent=2))
    settings = {f"{name}_token": pieces[index] for name, index in ids.items() if index is not None}
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "add_bos_token": bool(add_bos),
        "add_eos_token": bool(add_eos),
    }
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        settings["chat_template"] = template
    write_json_atomic(directory / "tokenizer_config.json", settings)


def _post_processor(pieces: list[str], bos: int | None, eos: int | None) -> dict | None:
    """Puts bos before and eos behind each text."""
    if bos is None and eos is None:
        return None

    def framed(text: str, sequence: int) -> list[dict]:
        inner = {"Sequence": {"id": text, "type_id": sequence}}
        before, behind = (
            [] if index is None else [{"SpecialToken": {"id": pieces[index], "type_id": sequence}}]
            for index in (bos, eos)
        )
        return [*before, inner, *behind]

    return {
        "type": "TemplateProcessing",
        "single": framed("A", 0),
        "pair": framed("A", 0) + framed("B", 1),
        "special_tokens": {
            pieces[index]: {"id": pieces[index], "ids": [index], "tokens": [pieces[index]]}
            for index in (bos, eos)
            if index is not None
        },
    }


def _is_filler(piece: str, kind: int, index: int) -> bool:
    """Whether llama.cpp's converter made this token up for a row of the embedding that no token has."""
    return kind == UNUSED and piece == f"[PAD{index}]"


def _byte_level(metadata: Mapping[str, Any], pre: str) -> dict:
    """tokenizer.json of a byte-level BPE."""
    pieces, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    added = [
        {"id": index, "content": piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": kind == CONTROL}
        for index, (piece, kind) in enumerate(zip(pieces, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    vocabulary = {
        piece: index
        for index, (piece, kind) in enumerate(zip(pieces, types, strict=True))
        if not _is_filler(piece, kind, index)
    }
    # As in the files of Llama 3 and Qwen, added tokens behind all pieces are no part of the model. The library then
    # counts their ids on from its size, so there may be no gap.
    if len(vocabulary) == max(vocabulary.values(), default=-1) + 1:
        last = max((index for index in vocabulary.values() if types[index] not in (CONTROL, USER_DEFINED)), default=-1)
        vocabulary = {piece: index for piece, index in vocabulary.items() if index <= last}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": NORMALIZERS.get(pre),
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": _BYTE_LEVEL | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in IGNORES_MERGES,
            "vocab": vocabulary,
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def _sentencepiece(metadata: Mapping[str, Any], ids: dict[str, int | None]) -> ModelProto:
    """tokenizer.model of a SentencePiece BPE: pieces, scores and types, and the settings that can be told from them."""
    pieces, types = list(metadata["tokenizer.ggml.tokens"]), metadata["tokenizer.ggml.token_type"]
    scores = metadata["tokenizer.ggml.scores"]
    while pieces and _is_filler(pieces[-1], types[len(pieces) - 1], len(pieces) - 1):
        pieces.pop()
    proto = sentencepiece_model_pb2.ModelProto()
    for index, (piece, score, kind) in enumerate(zip(pieces, scores, types, strict=False)):
        if kind == USER_DEFINED:
            # Runs of spaces are written as such there. They are found before anything is merged, whatever their score:
            # of merges (Gemma's runs) theirs are the first.
            piece, score = piece.replace(" ", SPACE), 0.0
        # A special token of Gemma's, the unknown one is written as one of control.
        kind = UNKNOWN if kind == CONTROL and index == ids["unk"] else kind
        proto.pieces.add(piece=piece, score=score, type=kind)
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = BPE, len(pieces), BYTE in types
    for name, index in ids.items():
        setattr(spec, f"{name}_id", -1 if index is None or index >= len(pieces) else index)
        if index is not None and index < len(pieces):
            setattr(spec, f"{name}_piece", pieces[index])
    # Only training on new text asks for it: LLaMA and Mistral have no piece of two digits.
    spec.split_digits = not any(
        kind == NORMAL and len(word := piece.lstrip(SPACE)) > 1 and word.isascii() and word.isdigit()
        for piece, kind in zip(pieces, types, strict=False)
    )
    rules.name, rules.remove_extra_whitespaces = "identity", False
    rules.add_dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    try:
        processor(proto)
        if [piece.type for piece in proto.pieces].count(UNKNOWN) != 1:
            raise RuntimeError("there has to be one unknown token")
    except RuntimeError as error:
        raise UserError(
            f"the tokens of the GGUF file are no SentencePiece vocabulary ({error}): use the model's Hugging Face directory instead"
        ) from error
    return proto
