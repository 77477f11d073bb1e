"""Records of files: JSON lines, text, Parquet and ArrayRecord, whole or a stretch of them."""

import contextlib
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any, cast

from cpt_jax.core.errors import UserError
from cpt_jax.core.stores import Location, is_address, open_binary, size_of

SUFFIXES = (".jsonl", ".txt", ".parquet", ".arrayrecord")
COMPRESSIONS = (".gz", ".zst")
# What compressed text grows by, roughly.
_UNPACKED = 3

Stretch = tuple[int, int | None]
WHOLE: Stretch = (0, None)


def kind_of(path: Location) -> str:
    """The suffix that says how a file is read.

    Raises:
      UserError: none is known, or what compresses by itself was compressed once more.
    """
    # Of notes.txt.jsonl the last one says what is in it.
    endings = (suffix.lower() for suffix in reversed(PurePosixPath(path).suffixes))
    kind = next((suffix for suffix in endings if suffix in SUFFIXES), "")
    if not kind:
        known = f"{', '.join(SUFFIXES)} ({', '.join(COMPRESSIONS)} of the first two)"
        raise UserError(f"{path} is of no known format; known: {known}")
    if kind == ".arrayrecord" and is_address(path):
        raise UserError(f"{path}: ArrayRecord files are read from a local disk: copy it there")
    if kind in (".parquet", ".arrayrecord") and _compressed(path):
        raise UserError(f"{path}: {kind} files are compressed inside: unpack it first")
    return kind


def _compressed(path: Location) -> bool:
    return PurePosixPath(path).suffix.lower() in COMPRESSIONS


def file_records(
    path: Location, field: str, columns: Iterable[str] | None, skipped: Counter, stretch: Stretch = WHOLE
) -> Iterator[dict]:
    """The records of a file, or of a stretch of it, as `stretches` cuts it. `field`: what a .txt file's documents go to;
    `columns`: all that is wanted of a Parquet file."""
    kind = kind_of(path)
    if kind == ".jsonl":
        yield from _json_lines(_lines(path, skipped, stretch), skipped)
    elif kind == ".txt":
        yield from ({field: text} for text in _paragraphs(path, skipped, stretch))
    elif kind == ".parquet":
        yield from _parquet_rows(path, columns, skipped, stretch)
    else:
        yield from _json_lines(_array_records(path, skipped, stretch), skipped)


def stretches(path: Location, size: int) -> list[tuple[Stretch, int]]:
    """A file cut into stretches of some `size` bytes of text, each with its bytes: of lines where they begin, of Parquet
    by groups of rows, of ArrayRecord by records. A compressed file is one stretch: it can only be read from its
    beginning."""
    kind, total = kind_of(path), size_of(path)
    if _compressed(path):
        return [(WHOLE, total * _UNPACKED)]
    if kind in (".jsonl", ".txt"):
        return [((start, min(start + size, total)), min(size, total - start)) for start in range(0, total, size)]
    if kind == ".parquet":
        metadata = _parquet_file(path).metadata
        weights = [metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)]
    else:
        records = _array_reader(path).num_records()
        weights = [max(1, total // max(1, records))] * records
    return _gathered(weights, size)


def _gathered(weights: list[int], size: int) -> list[tuple[Stretch, int]]:
    """Runs of things of these sizes, of at least `size` each but the last."""
    runs, first, gathered = [], 0, 0
    for index, weight in enumerate(weights):
        gathered += weight
        if gathered >= size or index == len(weights) - 1:
            runs.append(((first, index + 1), gathered))
            first, gathered = index + 1, 0
    return runs


def _open(path: Location) -> IO[bytes]:
    suffix = PurePosixPath(path).suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(open_binary(path) if is_address(path) else path, "rb"))
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFrames(open_binary(path)))
    return open_binary(path)


class _ZstdFrames(io.RawIOBase):
    """What the frames of a .zst file hold, one after the other; zstandard's own reader takes a file that was cut off
    for one that ends there."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self._frame: Any = None
        self._packed, self._unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self._unpacked:
            packed = self._packed or self._file.read(1 << 16)
            if not packed:
                if self._frame is not None:
                    raise EOFError("its last frame is not whole")
                return 0
            frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._unpacked = memoryview(frame.decompress(packed))
            self._frame, self._packed = (None, frame.unused_data) if frame.eof else (frame, b"")
        count = min(len(buffer), len(self._unpacked))
        buffer[:count], self._unpacked = self._unpacked[:count], self._unpacked[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _raw_lines(path: Location, start: int) -> Iterator[tuple[int, bytes]]:
    """The lines that begin at `start` or later, with where they begin."""
    import zstandard

    try:
        with _open(path) as file:
            position = 0
            if start:
                # A line that begins at `start` has a line's end before it.
                file.seek(start - 1)
                position = start - 1 + len(file.readline())
            for line in file:
                yield position, line
                position += len(line)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path} is truncated or not compressed as its name says ({error})") from error


def decoded(line: bytes) -> str | None:
    """Its text; None if it is not UTF-8."""
    # No text holds a NUL; UTF-16 does, and what it has of ASCII would be UTF-8 otherwise.
    if b"\0" in line:
        return None
    try:
        return line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError:
        return None


def _lines(path: Location, skipped: Counter, stretch: Stretch) -> Iterator[str]:
    for position, line in _raw_lines(path, stretch[0]):
        if stretch[1] is not None and position >= stretch[1]:
            return
        if (text := decoded(line)) is None:
            skipped["not UTF-8"] += 1
        else:
            yield text


def _json_lines(lines: Iterable[str], skipped: Counter) -> Iterator[dict]:
    for line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        # Malformed, or more than Python reads: numbers of thousands of digits, brackets within thousands of others.
        except (ValueError, RecursionError):
            skipped["malformed JSON"] += 1
            continue
        if isinstance(record, dict):
            yield record
        else:
            skipped["not a JSON object"] += 1


def _paragraphs(path: Location, skipped: Counter, stretch: Stretch) -> Iterator[str]:
    """Documents between empty lines. One belongs to the stretch in which the empty line before it begins; one with a line
    that is not UTF-8 is left out whole. Lines end with a line feed, also those of Windows."""
    start, stop = stretch
    block: list[str | None] = []
    inside = not start
    for position, line in _raw_lines(path, start):
        text = decoded(line)
        if text is not None and not text.strip():
            yield from _document(block, skipped)
            block = []
            inside = True
            if stop is not None and position >= stop:
                return
        elif inside:
            block.append(None if text is None else text.removesuffix("\n").removesuffix("\r"))
    yield from _document(block, skipped)


def _document(lines: list[str | None], skipped: Counter) -> Iterator[str]:
    """The document of these lines, if there are any; a line that is None was not UTF-8."""
    if None in lines:
        skipped["not UTF-8"] += 1
    elif lines:
        yield "\n".join(cast(list[str], lines))


def _parquet_file(path: Location) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(open_binary(path) if is_address(path) else path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is truncated or no Parquet file ({error})") from error


def parquet_columns(path: Location) -> list[str]:
    """The names of a Parquet file's columns."""
    with _parquet_file(path) as file:
        return file.schema_arrow.names


def _parquet_rows(path: Location, columns: Iterable[str] | None, skipped: Counter, stretch: Stretch) -> Iterator[dict]:
    with _damage_is_told(path, "Parquet"), _parquet_file(path) as file:
        stop = file.num_row_groups if stretch[1] is None else stretch[1]
        wanted = None if columns is None else list(columns)
        for group in range(stretch[0], stop):
            # Small batches: a row may be a book.
            for batch in file.iter_batches(1024, row_groups=[group], columns=wanted):
                yield from _rows(batch, skipped)


def _rows(batch: Any, skipped: Counter) -> Iterator[dict]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        # Row by row, to tell which.
        for index in range(len(batch)):
            try:
                (row,) = batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError:
                skipped["not UTF-8"] += 1
            else:
                yield row


@contextlib.contextmanager
def _damage_is_told(path: Location, kind: str) -> Iterator[None]:
    """Of a file that opens, and whose middle cannot be read."""
    import pyarrow

    try:
        yield
    # pyarrow's, and RuntimeError for riegeli's.
    except (pyarrow.ArrowException, OSError, RuntimeError) as error:
        reason = str(error).partition(";")[0]
        raise UserError(f"{path}: this {kind} file is damaged ({reason}): fetch it again") from error


def _array_reader(path: Location) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    if reader.ok():
        return reader
    try:
        # Which says why.
        reader.close()
    except RuntimeError as error:
        raise UserError(f"{path} is truncated or no ArrayRecord file ({error})") from error
    raise UserError(f"{path} is truncated or no ArrayRecord file")


def _array_records(path: Location, skipped: Counter, stretch: Stretch) -> Iterator[str]:
    reader = _array_reader(path)
    stop = reader.num_records() if stretch[1] is None else stretch[1]
    for index in range(stretch[0], stop):
        with _damage_is_told(path, "ArrayRecord"):
            record = reader.read([index])[0]
        if (text := decoded(record)) is None:
            skipped["not UTF-8"] += 1
        else:
            yield text
    reader.close()
