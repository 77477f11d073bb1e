"""Corpora: from a path, a glob, a TFDS or a Hugging Face name to documents; what is skipped is counted by reason."""

import collections
import dataclasses
import glob
import gzip
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast

from cpt_jax.core.errors import UserError
from cpt_jax.core.stores import Location, glob_addresses, is_address, open_binary
from cpt_jax.data import conversations
from cpt_jax.data.conversations import Message, Unusable, holds_conversation

SUFFIXES = (".jsonl", ".txt", ".parquet", ".arrayrecord")
COMPRESSIONS = (".gz", ".zst")

SkipCounts = collections.Counter
Format = Literal["text", "chat"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A named corpus. `spec`: a path or glob (.jsonl, .txt, .parquet, .arrayrecord, the first two also .gz or .zst), also
    in a store (s3://, gs://; no .arrayrecord), `tfds:NAME[/config][:split]`, or `hf:NAME_OR_DIR[:split]`.

    A record's text is in `text_field`. Records with the same `group_field` (a book's pages, a law's articles) are
    held out together. In a .txt file, documents are separated by empty lines. A record of the format "chat" holds a
    conversation instead (`conversations.conversation_of`), of which the assistant's part is learnt.
    """

    name: str
    spec: str
    text_field: str = "text"
    group_field: str | None = None
    format: Format = "text"

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"corpus name {self.name!r}: use letters, digits, '-' and '_'")


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, and what decides whether it is held out: its group, or the text itself. Of a conversation, the text is
    what was said in it."""

    text: str
    key: str
    messages: tuple[Message, ...] = ()


def read(corpus: Corpus, skipped: SkipCounts) -> Iterator[Document]:
    """The documents of a corpus, in order; what is not usable is counted in `skipped` by reason.

    Raises:
      UserError: nothing is there, the format is unknown, or no record is usable.
    """
    count = 0
    for record in _records(corpus, skipped):
        document = _document(corpus, record, skipped)
        if document is not None:
            count += 1
            yield document
    if not count:
        reasons = ", ".join(f"{number} x {reason}" for reason, number in skipped.most_common()) or "it is empty"
        raise UserError(f"corpus {corpus.name}={corpus.spec} holds no usable document ({reasons})")


def _document(corpus: Corpus, record: dict, skipped: SkipCounts) -> Document | None:
    messages: list[Message] = []
    if corpus.format == "chat":
        try:
            messages = conversations.conversation_of(record)
        except Unusable as reason:
            skipped[str(reason)] += 1
            return None
    text = conversations.plain_text(messages) if messages else record.get(corpus.text_field)
    if not isinstance(text, str):
        skipped[f"no text field {corpus.text_field!r}{_chat_hint(corpus, record)}"] += 1
        return None
    if not text.strip():
        skipped["empty"] += 1
        return None
    if corpus.group_field is None:
        return Document(text, text, tuple(messages))
    if corpus.group_field not in record:
        skipped[f"no group field {corpus.group_field!r}"] += 1
        return None
    return Document(text, str(record[corpus.group_field]), tuple(messages))


def _chat_hint(corpus: Corpus, fields: Iterable[str]) -> str:
    """What to do about records that are conversations."""
    if not holds_conversation(fields):
        return ""
    return f' but a conversation: give --chat {corpus.name}, or format="chat" in a recipe'


def named_corpora(specs: Sequence[tuple[str, str]], text_field: str, chat: Sequence[str]) -> list[Corpus]:
    """Corpora by their names; those named in `chat` hold conversations.

    Raises:
      UserError: `chat` names another.
    """
    names = [name for name, _ in specs]
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
    if corpus.spec.startswith(("tfds:", "hf:")):
        return []
    if is_address(corpus.spec):
        if not (addresses := glob_addresses(corpus.spec)):
            raise UserError(f"corpus {corpus.name}={corpus.spec}: there is no such file")
        return list(addresses)
    paths = sorted(Path(name) for name in glob.glob(str(Path(corpus.spec).expanduser()), recursive=True))
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise UserError(f"corpus {corpus.name}={corpus.spec}: there is no such file")
    return list(paths)


def _records(corpus: Corpus, skipped: SkipCounts) -> Iterator[dict]:
    if corpus.spec.startswith("tfds:"):
        yield from _tfds_records(corpus)
    elif corpus.spec.startswith("hf:"):
        yield from _hf_records(corpus)
    else:
        for path in files_of(corpus):
            yield from _file_records(path, corpus, skipped)


def _file_records(path: Location, corpus: Corpus, skipped: SkipCounts) -> Iterator[dict]:
    suffixes = [suffix for suffix in PurePosixPath(path).suffixes if suffix in (*SUFFIXES, *COMPRESSIONS)]
    kind = suffixes[0] if suffixes else ""
    if kind == ".jsonl":
        yield from _json_lines(_lines(path, skipped), skipped)
    elif kind == ".txt":
        yield from _paragraphs(_lines(path, skipped), corpus.text_field)
    elif kind == ".parquet":
        yield from _parquet_rows(path, corpus)
    elif kind == ".arrayrecord" and is_address(path):
        raise UserError(f"corpus {corpus.name}: {path}: ArrayRecord files are read from a local disk: copy it there")
    elif kind == ".arrayrecord":
        yield from _json_lines(_array_records(path), skipped)
    else:
        known = ", ".join(SUFFIXES)
        raise UserError(
            f"corpus {corpus.name}: {path} is of no known format; known: {known} ({', '.join(COMPRESSIONS)} of the first two)"
        )


def _open(path: Location) -> IO[bytes]:
    suffix = PurePosixPath(path).suffix
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(open_binary(path) if is_address(path) else path, "rb"))
    if suffix == ".zst":
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(open_binary(path)))  # type: ignore[arg-type]
    return open_binary(path)


def _lines(path: Location, skipped: SkipCounts) -> Iterator[str]:
    try:
        with _open(path) as file:
            for line in file:
                try:
                    yield line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8")
                except UnicodeDecodeError:
                    skipped["not UTF-8"] += 1
    except (EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is truncated or not compressed as its name says ({error})") from error


def _json_lines(lines: Iterable[str], skipped: SkipCounts) -> Iterator[dict]:
    for line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            skipped["malformed JSON"] += 1
            continue
        if isinstance(record, dict):
            yield record
        else:
            skipped["not a JSON object"] += 1


def _paragraphs(lines: Iterable[str], field: str) -> Iterator[dict]:
    block: list[str] = []
    for line in lines:
        if line.strip():
            block.append(line)
        elif block:
            yield {field: "".join(block).rstrip("\n")}
            block = []
    if block:
        yield {field: "".join(block).rstrip("\n")}


def _parquet_rows(path: Location, corpus: Corpus) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(open_binary(path) if is_address(path) else path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is truncated or no Parquet file ({error})") from error
    names, chat = file.schema_arrow.names, corpus.format == "chat"
    fields = conversations.FIELDS if chat else (corpus.text_field,)
    if chat and not holds_conversation(names):
        raise UserError(f"{path} has no conversation ({conversations.KNOWN}); its columns: {', '.join(names)}")
    if not chat and corpus.text_field not in names:
        hint = _chat_hint(corpus, names)
        raise UserError(f"{path} has no column {corpus.text_field!r}{hint}; it has: {', '.join(names)}")
    wanted = [name for name in (*fields, corpus.group_field) if name in names]
    for batch in file.iter_batches(columns=wanted):
        yield from batch.to_pylist()


def _array_records(path: Location) -> Iterator[str]:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    for index in range(reader.num_records()):
        yield reader.read([index])[0].decode()
    reader.close()


def _name_and_split(spec: str) -> tuple[str, str]:
    name, _, split = spec.partition(":")[2].partition(":")
    return name, split or "train"


def _tfds_records(corpus: Corpus) -> Iterator[dict]:
    import tensorflow_datasets

    name, split = _name_and_split(corpus.spec)
    try:
        # as_data_source reads ArrayRecord without TensorFlow; as_dataset would need it.
        source: Any = tensorflow_datasets.data_source(name, split=split)
    except Exception as error:
        raise UserError(
            f"corpus {corpus.name}={corpus.spec}: TFDS cannot open it ({str(error).splitlines()[0]})"
        ) from error
    for record in source:
        yield {key: value.decode() if isinstance(value, bytes) else value for key, value in record.items()}


def _hf_records(corpus: Corpus) -> Iterator[dict]:
    try:
        import datasets  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise UserError(
            f"corpus {corpus.name}={corpus.spec} needs the package datasets: pip install datasets"
        ) from error
    name, split = _name_and_split(corpus.spec)
    try:
        if (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists():
            source = datasets.load_from_disk(name)
            source = source[split] if isinstance(source, dict) else source
        else:
            source = datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:
        raise UserError(
            f"corpus {corpus.name}={corpus.spec} cannot be opened ({str(error).splitlines()[0]})"
        ) from error
    yield from cast(Iterable[dict], source)
