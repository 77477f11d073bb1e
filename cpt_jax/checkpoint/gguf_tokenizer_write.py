"""A Hugging Face tokenizer as the key-value pairs of a GGUF file: what `gguf_tokenizer` reads."""

from typing import Any

from cpt_jax.checkpoint.gguf_tokenizer import IGNORES_MERGES, NORMALIZERS, PRE_TOKENIZERS, UNUSED
from cpt_jax.core.errors import UserError
from cpt_jax.vocab.sentencepiece_model import BPE, CONTROL, NORMAL, SPACE, USER_DEFINED
from cpt_jax.vocab.tokenizer import Tokenizer

# What normalizers and pre-tokenizers differ in, besides a vocabulary's own pieces.
_PROBES = (
    "It's 12,345.67 o'clock,  isn't it?\n\n\tWE'LL  see... \r\n x\u00a0y ",
    "ﬁne ① Ⅷ ｆｕｌｌ e\u0301 \u200bé 𝔘",
    "第三十七条 中华人民共和国，2024年。 नमस्ते العربية ไทย 한국어 🙂🏽",
    "def f(x):\n    return x**2  # <|x|> </s>",
)


def tokenizer_pairs(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Pieces, their types, and how text is cut into them; `rows` of the embedding that have no piece get fillers.

    Raises:
      UserError: a tokenizer that llama.cpp has no name for, or that has more ids than the embedding rows. Special
      tokens may be beyond it (Gemma 3's for images): text has none of them.
    """
    proto = tokenizer.sentencepiece
    added = {token["id"]: token for token in tokenizer.document["added_tokens"]}
    if any(not added.get(index, {}).get("special") for index in range(rows, tokenizer.size)):
        raise UserError(
            f"{tokenizer.directory}: the tokenizer has {tokenizer.size:,} ids, the embedding {rows:,} rows: run `cpt model "
            "extend`, or give the model its own tokenizer"
        )
    kinds = {index: CONTROL if token["special"] else USER_DEFINED for index, token in added.items()}
    if proto is not None and proto.trainer_spec.model_type == BPE:
        pieces = {index: piece.piece for index, piece in enumerate(proto.pieces)}
        own = {index: piece.type for index, piece in enumerate(proto.pieces)}
        # Whether they are found in plain text tokenizer.json says: Gemma's tokens of chats are user-defined otherwise.
        kinds = own | {i: kind for i, kind in kinds.items() if own.get(i, kind) in (CONTROL, USER_DEFINED)}
        # llama.cpp's converter gives those of users the score of its fillers: they are found before anything is merged.
        scores = [-1000.0 if piece.type == USER_DEFINED else piece.score for piece in proto.pieces][:rows]
        pairs: dict[str, Any] = {
            "model": "llama",
            "pre": "default",
            "add_space_prefix": bool(proto.normalizer_spec.add_dummy_prefix),
            "scores": scores + [-1000.0] * (rows - len(scores)),
        }
    else:
        pieces = {index: piece for piece, index in tokenizer.backend.get_vocab(with_added_tokens=False).items()}
        pairs = {"model": "gpt2", "pre": _pre_of(tokenizer)}
        pairs["merges"] = [" ".join(merge) for merge in tokenizer.merges]
    pieces |= {index: token["content"] for index, token in added.items()}
    if proto is not None:
        # llama.cpp looks for these in text as it is, before it writes spaces as SentencePiece does.
        pieces |= {i: pieces[i].replace(SPACE, " ") for i, kind in kinds.items() if kind == USER_DEFINED}
    # As llama.cpp's converter fills up.
    pairs["tokens"] = [pieces.get(index, f"[PAD{index}]") for index in range(rows)]
    pairs["token_type"] = [kinds.get(index, NORMAL if index in pieces else UNUSED) for index in range(rows)]
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    specials = tokenizer.named_special_tokens
    ids = {theirs: tokenizer.backend.token_to_id(specials[ours]) for ours, theirs in named.items() if ours in specials}
    pairs |= {f"{name}_token_id": index for name, index in ids.items() if index is not None and index < rows}
    framed = tokenizer.backend.encode("a").ids
    pairs["add_bos_token"] = len(framed) > 1 and framed[0] == ids.get("bos")
    pairs["add_eos_token"] = len(framed) > 1 and framed[-1] == ids.get("eos")
    written = {f"tokenizer.ggml.{name}": value for name, value in pairs.items()}
    template = tokenizer.chat_template
    return written if template is None else written | {"tokenizer.chat_template": template}


def _pre_of(tokenizer: Tokenizer) -> str:
    """What llama.cpp calls the way in which text is cut before merges are applied."""
    document = tokenizer.document
    if document["model"]["type"] != "BPE" or document["model"].get("byte_fallback"):
        raise UserError(
            f"{tokenizer.directory} has a tokenizer that cannot be written as GGUF: byte-level BPE can, and SentencePiece BPE "
            "with its tokenizer.model"
        )
    wanted = _steps(document["pre_tokenizer"])
    for step in wanted:
        # Another way to write that what matches is a piece: GPT-4's pattern leaves nothing between its matches.
        if step["type"] == "Split" and step["behavior"] == "Removed" and step["invert"]:
            step |= {"behavior": "Isolated", "invert": False}
    for name, pre_tokenizer in PRE_TOKENIZERS.items():
        same = _steps(pre_tokenizer) == wanted and document["normalizer"] == NORMALIZERS.get(name)
        if same and bool(document["model"].get("ignore_merges")) == (name in IGNORES_MERGES):
            return name
    raise UserError(
        f"{tokenizer.directory} cuts text before its merges in a way that is none of {', '.join(PRE_TOKENIZERS)}: it cannot be "
        "written as GGUF"
    )


def _steps(pre_tokenizer: dict | None) -> list[dict]:
    """The steps of a pre-tokenizer, without what only concerns offsets."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for each in pre_tokenizer["pretokenizers"] for step in _steps(each)]
    return [{name: value for name, value in pre_tokenizer.items() if name != "trim_offsets"}]


def refuse_other_tokens(tokenizer: Tokenizer, again: Tokenizer) -> None:
    """Raises UserError unless both cut the text of every piece, and of some that normalizers change, alike."""
    texts = [*_PROBES, *(tokenizer.piece_bytes(index).decode(errors="ignore") for index in range(tokenizer.size))]
    for text, ours, theirs in zip(texts, tokenizer.encode_documents(texts), again.encode_documents(texts), strict=True):
        if ours != theirs:
            raise UserError(
                f"{tokenizer.directory}: {text!r} would be cut otherwise by what GGUF says of this tokenizer "
                f"({theirs} instead of {ours}): it cannot be written as GGUF"
            )
