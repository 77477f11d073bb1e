"""Corpora: from a path, a glob, a TFDS or a Hugging Face name to documents; what is skipped is counted by reason."""

import collections
import contextlib
import dataclasses
import glob
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import MOST_BYTES, is_file_name
from cpt_jax.core.stores import Location, glob_addresses, is_address, state_of
from cpt_jax.data import conversations
from cpt_jax.data.catalogues import is_catalogued, named_records, named_state
from cpt_jax.data.conversations import Message, Unusable, holds_conversation
from cpt_jax.data.files import SUFFIXES, WHOLE, Stretch, decoded, file_records, kind_of, parquet_columns

SkipCounts = collections.Counter
Format = Literal["text", "chat"]
# JSON can spell what is no text: half of a pair.
_SURROGATES = re.compile("[\ud800-\udfff]")
# Why a document may not be learnt from.
HELD_OUT = "held out"
# The field that is true where a text is cut before its end.
TRUNCATED = "truncated"
_NAME_IT = "name the one with text: --text-field NAME, or of one corpus of a run --domains.0.corpus.text_field NAME"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A named corpus. `spec`: a path or glob (.jsonl, .txt, .parquet, .arrayrecord, the first two also .gz or .zst), also
    in a store (s3://, gs://, hf://; no .arrayrecord), `tfds:NAME_OR_DIR[/config][:split]`, `hf:ORG/NAME[/config][:split]`,
    or `hf:DIR[:split]` (the split is `train` unless told otherwise; of `hf:`, `train[:1000]` is a part of it).

    A record's text is in `text_field`; where that is cut before its end, `truncated` is true. Records with the same
    `group_field` (a book's pages, a law's articles) are held out together. In a .txt file, documents are separated by
    empty lines. A record of the format "chat" holds a conversation instead (`conversations.conversation_of`), of which
    the assistant's part is learnt.
    """

    name: str
    spec: str
    text_field: str = "text"
    group_field: str | None = None
    format: Format = "text"

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"corpus name {self.name!r}: use letters, digits, '-' and '_'")
        if not is_file_name(self.name):
            raise UserError(f"corpus name {self.name!r}: give one of at most {MOST_BYTES} bytes, as in NAME=SPEC")


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, and what decides whether it is held out: its group, or the text itself. Of a conversation, the text is
    what was said in it. A text that is `truncated` does not end where it stops."""

    text: str
    key: str
    messages: tuple[Message, ...] = ()
    truncated: bool = False


def read(corpus: Corpus, skipped: SkipCounts) -> Iterator[Document]:
    """The documents of a corpus, in order; what is not usable is counted in `skipped` by reason.

    Raises:
      UserError: nothing is there, the format is unknown, or no record is usable.
    """
    count = 0
    for record in _records(corpus, skipped):
        document = document_of(corpus, record, skipped)
        if document is not None:
            count += 1
            yield document
    if not count:
        raise nothing_usable(corpus, skipped)


def nothing_usable(corpus: Corpus, skipped: Mapping[str, int]) -> UserError:
    """Says why a corpus has nothing to learn from."""
    reasons = counted(skipped) or "it is empty"
    apart = "give more documents" if HELD_OUT in skipped else "give one that does"
    remedy = _other_fields(corpus) or apart
    return UserError(f"corpus {corpus.name}={corpus.spec} holds no usable document ({reasons}): {remedy}")


def counted(skipped: Mapping[str, int]) -> str:
    """Reasons with their numbers, the most frequent first."""
    return ", ".join(f"{number:,} x {reason}" for reason, number in sorted(skipped.items(), key=lambda each: -each[1]))


def _other_fields(corpus: Corpus) -> str:
    """What to do about a first record whose text stands in another field."""
    record = next(_records(corpus, SkipCounts()), {})
    fields = [name for name, value in record.items() if isinstance(value, str)]
    if corpus.format == "chat" or corpus.text_field in record or holds_conversation(record) or not fields:
        return ""
    return f"its records have {', '.join(fields)}; {_NAME_IT}"


def document_of(corpus: Corpus, record: dict, skipped: SkipCounts) -> Document | None:
    """A record's document, or None where it has none, which is counted."""
    messages: list[Message] = []
    if corpus.format == "chat":
        try:
            messages = conversations.conversation_of(record)
        except Unusable as reason:
            skipped[str(reason)] += 1
            return None
    text = conversations.plain_text(messages) if messages else record.get(corpus.text_field)
    if isinstance(text, bytes) and (text := decoded(text)) is None:
        # A column of Parquet that is not said to be text.
        skipped["not UTF-8"] += 1
        return None
    if not isinstance(text, str):
        what = f"no text field {corpus.text_field!r}" if text is None else f"{corpus.text_field!r} is {_kind(text)}"
        skipped[f"{what}{_chat_hint(corpus, record)}"] += 1
        return None
    if not text.strip():
        skipped["empty"] += 1
        return None
    # A column of Parquet has None where JSON lines leave a field out.
    group = text if corpus.group_field is None else record.get(corpus.group_field)
    if group is None:
        skipped[f"no group field {corpus.group_field!r}"] += 1
        return None
    key = str(group)
    if any(not each.isascii() and _SURROGATES.search(each) for each in (text, key)):
        skipped["half a UTF-16 pair"] += 1
        return None
    return Document(text, key, tuple(messages), record.get(TRUNCATED) is True)


def _kind(value: object) -> str:
    """What stands where a text should."""
    kinds = {list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    return f"{kinds.get(type(value), type(value).__name__)}, not a text"


def _chat_hint(corpus: Corpus, fields: Iterable[str]) -> str:
    """What to do about records that are conversations."""
    if not holds_conversation(fields):
        return ""
    return f' but a conversation: give --chat {corpus.name}, or format="chat" in a recipe'


def named_corpora(specs: Sequence[tuple[str, str]], text_field: str, chat: Sequence[str]) -> list[Corpus]:
    """Corpora by their names; those named in `chat` hold conversations.

    Raises:
      UserError: a name is given twice, or `chat` names another.
    """
    names = [name for name, _ in specs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"corpus {twice[0]!r} is given twice: give each a name of its own, or name their files by one glob"
        )
    if unknown := [name for name in chat if name not in names]:
        raise UserError(f"--chat names {unknown[0]!r}, but the corpora are {', '.join(names)}: give one of these")
    return [
        Corpus(name=name, spec=spec, text_field=text_field, format="chat" if name in chat else "text")
        for name, spec in specs
    ]


def corpora_of(specs: Sequence[str], text_field: str) -> list[Corpus]:
    """Corpora named by their files' names, numbered where two have the same.

    Raises:
      UserError: there is no such file.
    """
    corpora: list[Corpus] = []
    for spec in specs:
        stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(spec).name.split(".")[0]) or "corpus"
        taken = {corpus.name for corpus in corpora}
        numbered = (stem if count == 1 else f"{stem}-{count}" for count in itertools.count(1))
        name = next(name for name in numbered if name not in taken)
        corpora.append(Corpus(name=name, spec=spec, text_field=text_field))
        files_of(corpora[-1])
    return corpora


def texts_of(corpora: Iterable[Corpus]) -> Iterator[str]:
    """The texts of all documents, one corpus after the other."""
    for corpus in corpora:
        for document in read(corpus, SkipCounts()):
            yield document.text


def files_of(corpus: Corpus) -> list[Location]:
    """The files a corpus is read from, sorted; none for `tfds:` and `hf:`."""
    if is_catalogued(corpus.spec):
        return []
    if is_address(corpus.spec):
        if not (addresses := glob_addresses(corpus.spec)):
            raise UserError(f"corpus {corpus.name}={corpus.spec}: there is no such file")
        return list(addresses)
    given = Path(corpus.spec).expanduser()
    # A name may hold what a pattern means something by, as in data[1].jsonl.
    named = [given] if given.is_file() else map(Path, glob.glob(str(given), recursive=True))
    paths = sorted(path for path in named if path.is_file())
    if not paths and given.is_dir():
        there = next((path.suffix for path in sorted(given.rglob("*")) if path.suffix.lower() in SUFFIXES), ".jsonl")
        raise UserError(
            f"corpus {corpus.name}={corpus.spec} is a directory: name its files, as in "
            f"{corpus.name}='{corpus.spec.rstrip('/')}/**/*{there}' (with its quotes)"
        )
    if not paths:
        raise UserError(f"corpus {corpus.name}={corpus.spec}: there is no such file")
    return list(paths)


def _records(corpus: Corpus, skipped: SkipCounts) -> Iterator[dict]:
    if is_catalogued(corpus.spec):
        with told_of(corpus):
            yield from named_records(corpus.spec)
    else:
        for path in files_of(corpus):
            yield from stretch_of(corpus, path, WHOLE, skipped)


def stretch_of(corpus: Corpus, source: Location, stretch: Stretch, skipped: SkipCounts) -> Iterator[dict]:
    """The records of a stretch of one of a corpus's files, or of its named data set."""
    with told_of(corpus):
        if is_catalogued(corpus.spec):
            yield from named_records(corpus.spec, stretch)
        else:
            columns = _columns(corpus, source) if kind_of(source) == ".parquet" else None
            yield from file_records(source, corpus.text_field, columns, skipped, stretch)


@contextlib.contextmanager
def told_of(corpus: Corpus) -> Iterator[None]:
    """Puts the corpus's name before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"corpus {corpus.name}: {error}") from error


def _columns(corpus: Corpus, path: Location) -> list[str]:
    """What is read of a Parquet file."""
    names, chat = parquet_columns(path), corpus.format == "chat"
    fields = conversations.FIELDS if chat else (corpus.text_field,)
    if chat and not holds_conversation(names):
        raise UserError(f"{path} has no conversation ({conversations.KNOWN}); its columns: {', '.join(names)}")
    if not chat and corpus.text_field not in names:
        hint = _chat_hint(corpus, names)
        remedy = "" if hint else f"; {_NAME_IT}"
        raise UserError(f"{path} has no column {corpus.text_field!r}{hint}; it has: {', '.join(names)}{remedy}")
    return [name for name in (*fields, corpus.group_field, TRUNCATED) if name in names]


def corpus_state(corpus: Corpus) -> list:
    """What tells whether a corpus is still the one that was read: its files' names, sizes and times (or marks)."""
    if is_catalogued(corpus.spec):
        return named_state(corpus.spec)
    return [state_of(str(file)) if is_address(file) else _file_state(Path(file)) for file in files_of(corpus)]


def _file_state(path: Path) -> list:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]
