"""A Hugging Face tokenizer, as far as training needs it."""

import collections
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from cpt_jax.core.errors import UserError
from cpt_jax.vocab.sentencepiece_model import SPACE, ModelProto, fast_tokenizer, read_model, settings_of

DOCUMENT_SEPARATOR = "<|endoftext|>"
# SentencePiece's piece for a byte.
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The byte that a character of a byte-level piece stands for (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _tiktoken(directory: Path) -> bool:
    return any(directory.glob("*.tiktoken"))


class Tokenizer:
    """tokenizer.json of a model directory, or, where there is none, what it would be for its tokenizer.model.

    Raises:
      UserError: there is neither, or it cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        path = self.directory / "tokenizer.json"
        if path.exists():
            self._text = path.read_text(encoding="utf-8")
        elif self.sentencepiece is not None:
            self._text = fast_tokenizer(self.sentencepiece)
        else:
            hint = "a tiktoken file without its table of merges cannot be read; " if _tiktoken(self.directory) else ""
            raise UserError(
                f"{directory} has no tokenizer.json and no tokenizer.model: {hint}give a model or tokenizer directory that has one"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self._text)
        except Exception as error:
            raise UserError(f"{path} cannot be read ({error}): fetch the tokenizer again") from error
        # Of whom it was saved by, for batches of theirs; transformers drops them too.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Text that speaks of a special token is text.
        self._tokenizer.encode_special_tokens = True

    @functools.cached_property
    def document(self) -> dict:
        """tokenizer.json as JSON, added tokens with the ids that they have: `tokenizers`, and so transformers, gives the
        next free ones to those that the vocabulary lacks, whatever the file says. Without a length that texts would be
        cut or filled up to."""
        document = json.loads(self._text)
        document |= {name: None for name in ("truncation", "padding") if document.get(name)}
        for token in document["added_tokens"]:
            token["id"] = self._tokenizer.token_to_id(token["content"])
        return document

    @functools.cached_property
    def sentencepiece(self) -> ModelProto | None:
        """tokenizer.model, where there is one."""
        path = self.directory / "tokenizer.model"
        return read_model(path) if path.exists() else None

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The merges of a BPE in order; older files write a merge as one text."""
        written = self.document["model"]["merges"]
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in written)
        return [(left, right) for left, right in pairs]

    @functools.cached_property
    def settings(self) -> dict:
        """tokenizer_config.json."""
        path = self.directory / "tokenizer_config.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        return {} if self.sentencepiece is None else settings_of(self.sentencepiece)

    @functools.cached_property
    def chat_template(self) -> str | None:
        """The template of a chat, from its own file or tokenizer_config.json."""
        path = self.directory / "chat_template.jinja"
        if path.exists():
            return path.read_text(encoding="utf-8")
        written = self.settings.get("chat_template")
        if isinstance(written, list):
            return {each["name"]: each["template"] for each in written}.get("default")
        return written

    @property
    def named_special_tokens(self) -> dict[str, str]:
        """The special tokens that have a name, as chat templates call them: bos_token, eos_token ..."""
        names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
        written = {name: self.settings.get(name) for name in names}
        contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in written.items()}
        return {name: content for name, content in contents.items() if content is not None}

    @property
    def added_tokens(self) -> list[str]:
        """Tokens that are found in a text before anything else; the special ones among them only in a marked text."""
        return [token["content"] for token in self.document["added_tokens"]]

    @property
    def special_tokens(self) -> list[str]:
        """Those of the added tokens that are no text."""
        return [token["content"] for token in self.document["added_tokens"] if token["special"]]

    @functools.cached_property
    def size(self) -> int:
        """Rows that an embedding needs: the highest id, and one."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of tokenizer.json's meaning."""
        return hashlib.sha256(json.dumps(self.document, sort_keys=True).encode()).hexdigest()

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens around or in it: their names are plain text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_marked(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """Texts in which special tokens are meant as such (a chat template's); `ids`, and `offsets` in characters."""
        return self._marked.encode_batch(texts, add_special_tokens=False)

    def encode_placed(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """The tokens of `encode_documents` with the characters that they stand for; `ids`, and `offsets`."""
        return self._plain.encode_batch(texts, add_special_tokens=False)

    @functools.cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        # What stands behind the model only adds special tokens, and trims spaces off the offsets.
        return tokenizers.Tokenizer.from_str(json.dumps(self.document | {"post_processor": None}))

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self.document | {"post_processor": None}))
        tokenizer.encode_special_tokens = True
        return tokenizer

    def count(self, texts: Iterable[str]) -> collections.Counter[int]:
        """How often each token stands in the texts, a batch of them in memory at a time."""
        counts: collections.Counter[int] = collections.Counter()
        iterator = iter(texts)
        while batch := list(itertools.islice(iterator, 1024)):
            counts.update(itertools.chain.from_iterable(self.encode_documents(batch)))
        return counts

    def encode(self, text: str) -> list[int]:
        return self.encode_documents([text])[0]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens shown."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def piece(self, index: int) -> str:
        """A token as text to look at: `piece_bytes`, those of a character that is not whole as <0xE6>."""
        text = self.piece_bytes(index).decode(errors="surrogateescape")
        return re.sub("[\udc80-\udcff]", lambda byte: f"<0x{ord(byte[0]) - 0xDC00:02X}>", text)

    def piece_bytes(self, index: int) -> bytes:
        """The UTF-8 that a token stands for, which may begin or end within a character; with the space before a word
        (SentencePiece drops a text's first one)."""
        if (added := self._added.get(index)) is not None:
            return added.content.encode()
        text = self._tokenizer.decode([index], skip_special_tokens=False)
        inner = self._tokenizer.id_to_token(index) or ""
        if "\ufffd" in text and (byte := BYTE.fullmatch(inner)):
            return bytes([int(byte[1], 16)])
        if "\ufffd" in text and byte_alphabet().keys() >= set(inner):
            return bytes(byte_alphabet()[character] for character in inner)
        spaced = inner.startswith(SPACE) and not text.startswith(" ")
        return (" " + text if spaced else text).encode()

    @functools.cached_property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        return self._tokenizer.get_added_tokens_decoder()

    def _special(self, name: str) -> int | None:
        content = self.named_special_tokens.get(name)
        return None if content is None else self._tokenizer.token_to_id(content)

    @functools.cached_property
    def start_id(self) -> int:
        """The token before a document: the one the tokenizer itself puts there, or the separator of documents in
        pre-training.

        SmolLM2-135M on held-out text: 2.24 bits per byte after <|endoftext|>, 2.34 after its bos token, which begins
        a chat turn.
        """
        framed = self._tokenizer.encode("a").ids
        if len(framed) > 1 and framed[0] == self._special("bos_token"):
            return framed[0]
        return self.end_id

    @functools.cached_property
    def end_id(self) -> int:
        """The token after a document: <|endoftext|> where there is one (an instruction model's eos ends a turn), or
        eos.

        Raises:
          UserError: the tokenizer has neither.
        """
        for found in (
            self._tokenizer.token_to_id(DOCUMENT_SEPARATOR),
            self._special("eos_token"),
            self._special("bos_token"),
        ):
            if found is not None:
                return found
        raise UserError(
            f"{self.directory}: the tokenizer has no {DOCUMENT_SEPARATOR}, eos or bos token to separate documents with"
        )

    @functools.cached_property
    def unknown_id(self) -> int | None:
        """The token that stands for any text which the vocabulary cannot spell, where there is one."""
        model = self.document["model"]
        name = model.get("unk_token")
        return model.get("unk_id") if name is None else self._tokenizer.token_to_id(name)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The `tokenizers` object, for what only it can do."""
        return self._tokenizer
