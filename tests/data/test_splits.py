"""Splits, whatever their size, hold a corpus's documents once and in order."""

import gzip
import json
import random

import pytest

from cpt_jax.core.errors import UserError
from cpt_jax.data import splits
from cpt_jax.data.sources import Corpus, SkipCounts, read
from cpt_jax.data.splits import read_split, splits_of


def documents(count: int) -> list[str]:
    generator = random.Random(3)
    return [f"{index} " + "слово " * generator.randint(0, 30) + "。" for index in range(count)]


def write(kind: str, path, texts: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet
    from array_record.python.array_record_module import ArrayRecordWriter

    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts]
    if kind == "jsonl":
        # What is no record is met, and counted, by one split.
        path.write_bytes(b"".join([*lines[:5], b"{no\n", b'{"text": "\xff"}\n', b"\n", *lines[5:]]))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(b"".join(lines)))
    elif kind == "txt":
        between = ["\n\n", "\n \n\n", "\n\r\n", "\n\u3000\n"]
        blocks = [text + "\n" + text + between[index % 4] for index, text in enumerate(texts)]
        path.write_bytes(b"\n\n" + "".join(blocks).encode() + b"la\xffst\nline")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pa.table({"text": texts, "n": range(len(texts))}), path, row_group_size=7)
    else:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for line in lines:
            writer.write(line)
        writer.close()


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "txt", "parquet", "arrayrecord"])
def test_splits_are_the_corpus(tmp_path, kind):
    for index, count in enumerate((40, 1, 90)):
        write(kind, tmp_path / f"{index}.{kind}", documents(count))
    corpus = Corpus(name="c", spec=str(tmp_path / f"*.{kind}"))
    skipped = SkipCounts()
    expected = list(read(corpus, skipped))
    assert len(expected) >= 131
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    numbers = []
    for split_bytes in (1, 13, 50, 200, 1000, 3000, size // 2, 10 * size):
        found_splits = splits_of(corpus, split_bytes)
        numbers.append(len(found_splits))
        counted = SkipCounts()
        found = [document for split in found_splits for document in read_split(corpus, split, counted)]
        assert found == expected, split_bytes
        assert counted == skipped, split_bytes
        assert [split.index for split in found_splits] == list(range(len(found_splits)))
    # Small files share a split, large ones have several.
    assert numbers[-1] == 1
    assert numbers[0] >= (3 if kind == "jsonl.gz" else 18)


def test_files_are_put_together_up_to_the_size(tmp_path, monkeypatch):
    line = json.dumps({"text": "the city"}).encode() + b"\n"
    for index in range(5):
        (tmp_path / f"{index}.jsonl").write_bytes(line * 10)
    corpus, size = Corpus(name="c", spec=str(tmp_path / "*.jsonl")), 10 * len(line)
    assert [len(split.parts) for split in splits_of(corpus, 2 * size)] == [2, 2, 1]
    assert [len(split.parts) for split in splits_of(corpus, 2 * size - 1)] == [1] * 5
    # What is larger than the size and cannot be cut is a split, with none before it.
    (tmp_path / "large.jsonl.gz").write_bytes(gzip.compress(line))
    assert [len(split.parts) for split in splits_of(Corpus(name="c", spec=str(tmp_path / "*.gz")), 1)] == [1]
    # No more than the loader can keep open: the size grows, and the stretches with it.
    monkeypatch.setattr(splits, "MOST_SPLITS", 4)
    few = splits_of(Corpus(name="c", spec=str(tmp_path / "0.jsonl")), size // 10)
    assert [len(split.parts) for split in few] == [1, 1, 1, 1]


def test_a_compressed_file_may_have_several_frames(tmp_path):
    import zstandard

    lines = [json.dumps({"text": text}).encode() + b"\n" for text in documents(20)]
    frame = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(frame(b"".join(lines[:10])) + frame(b"".join(lines[10:])))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:10])) + gzip.compress(b"".join(lines[10:])))
    for suffix in ("zst", "gz"):
        corpus = Corpus(name="c", spec=str(tmp_path / f"a.jsonl.{suffix}"))
        assert [document.text for document in read(corpus, SkipCounts())] == documents(20)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.parquet.gz", "compressed inside: unpack it first"),
        ("a.arrayrecord.zst", "compressed inside: unpack it first"),
        ("a.jsonl.zst", "truncated or not compressed as its name says"),
        ("a.arrayrecord", "truncated or no ArrayRecord file"),
    ],
)
def test_what_cannot_be_unpacked_is_told(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"neither of these")
    with pytest.raises(UserError, match=f"corpus c: .*{name}.*{message}"):
        list(read(Corpus(name="c", spec=str(tmp_path / name)), SkipCounts()))
    if "compressed inside" in message:
        with pytest.raises(UserError, match=f"^corpus c: .*{name}.*{message}"):
            splits_of(Corpus(name="c", spec=str(tmp_path / name)))


def test_half_a_pair_of_utf_16_is_counted_and_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud83d of it"}\n{"text": "whole \\ud83d\\ude00"}\n')
    skipped = SkipCounts()
    assert [each.text for each in read(Corpus(name="c", spec=str(tmp_path / "a.jsonl")), skipped)] == ["whole 😀"]
    assert skipped == {"half a UTF-16 pair": 1}
