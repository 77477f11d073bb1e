"""Corpora in every format, what is skipped, and what is held out."""

import gzip
import json
import os

import pytest
from inputs import english, write_jsonl

from cpt_jax.core.errors import UserError
from cpt_jax.data.holdout import Holdout, read_heldout, training_documents, write_heldout
from cpt_jax.data.prepare import NOT_LEARNT, decode_record, encode_record, read_manifest
from cpt_jax.data.sources import Corpus, Document, SkipCounts, nothing_usable, read

TEXTS = ["first document", "второй", "第三 篇"]


def texts_of(spec, **settings) -> list[str]:
    return [document.text for document in read(Corpus(name="c", spec=str(spec), **settings), SkipCounts())]


def test_every_format_gives_the_same_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet
    import zstandard
    from array_record.python.array_record_module import ArrayRecordWriter

    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(plain.read_bytes()))
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    pyarrow.parquet.write_table(pa.table({"text": TEXTS, "other": [1, 2, 3]}), tmp_path / "a.parquet")
    writer = ArrayRecordWriter(str(tmp_path / "a.arrayrecord"), "group_size:1")
    for text in TEXTS:
        writer.write(json.dumps({"text": text}).encode())
    writer.close()
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.parquet", "a.arrayrecord"):
        assert texts_of(tmp_path / name) == TEXTS, name
    assert texts_of(tmp_path / "a.jsonl*") == TEXTS * 3


def test_bad_records_are_skipped_and_counted_by_reason(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [b'{"text": "good"}', b"{not json", b'{"body": "x"}', b'{"text": "  "}', b'{"text": "\xff"}', b"[1]", b""]
    path.write_bytes(b"\n".join(lines))
    skipped = SkipCounts()
    assert [document.text for document in read(Corpus(name="c", spec=str(path)), skipped)] == ["good"]
    assert skipped == {
        "malformed JSON": 1,
        "no text field 'text'": 1,
        "empty": 1,
        "not UTF-8": 1,
        "not a JSON object": 1,
    }


def test_a_text_field_that_holds_no_text_is_counted_as_what_it_holds(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    values = ["good", None, ["a", "b"], {"a": "b"}, 1.5, True]
    lines = [json.dumps({"text": value}) for value in values]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    skipped = SkipCounts()
    assert [document.text for document in read(Corpus(name="c", spec=str(tmp_path / "a.jsonl")), skipped)] == ["good"]
    kinds = ("a list", "an object", "a number", "true or false")
    assert skipped == {"no text field 'text'": 1} | {f"'text' is {kind}, not a text": 1 for kind in kinds}
    pyarrow.parquet.write_table(pa.table({"text": [["a", "b"], ["c"]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="2 x 'text' is a list, not a text"):
        texts_of(tmp_path / "a.parquet")


def test_a_document_that_is_not_utf8_is_left_out_whole(tmp_path):
    path = tmp_path / "old.TXT"
    path.write_bytes("good\n\nplain\nschön\nplain\nschön\n\ngood too\n".encode("latin-1"))
    skipped = SkipCounts()
    assert [document.text for document in read(Corpus(name="c", spec=str(path)), skipped)] == ["good", "good too"]
    assert skipped == {"not UTF-8": 1}


def test_utf16_is_no_text(tmp_path):
    path = tmp_path / "wide.txt"
    path.write_bytes("Disks\n\nschön\n\nDisks\n".encode("utf-16"))
    with pytest.raises(UserError, match="1 x not UTF-8"):
        texts_of(path)


def test_the_lines_of_windows_end_as_all_others(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r\n")
    assert texts_of(path) == ["one\ntwo", "three"]


def test_a_directory_is_told_with_what_is_in_it(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"\*\*/\*\.txt"):
        texts_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "there is no such file"),
        ("empty.jsonl", b"", "it is empty"),
        ("bad.jsonl", b'{"body": "x"}\n', "1 x no text field 'text'.*: its records have body; name .*--text-field"),
        ("data.csv", b"a,b\n", "no known format"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 100, mtime=0)[:-20], "truncated"),
        ("cut.parquet", b"PAR1xxxx", "no Parquet file"),
    ],
)
def test_unusable_corpora_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts_of(tmp_path / name)


def damaged(name: str, path) -> None:
    """A file of 3,000 records that opens, and that cannot be read to its end."""
    import pyarrow as pa
    import pyarrow.parquet
    import zstandard
    from array_record.python.array_record_module import ArrayRecordWriter

    texts = [os.urandom(40).hex() for _ in range(3000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    kind, _, how = name.partition(" ")
    if kind == "parquet":
        pyarrow.parquet.write_table(pa.table({"text": texts}), path)
    elif kind == "arrayrecord":
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for line in lines.splitlines():
            writer.write(line)
        writer.close()
    else:
        path.write_bytes(gzip.compress(lines) if kind == "jsonl.gz" else zstandard.ZstdCompressor().compress(lines))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if how == "cut off":
        del content[middle:]
    else:
        content[middle : middle + 2000] = bytes(byte ^ 0xFF for byte in content[middle : middle + 2000])
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["jsonl.zst cut off", "jsonl.gz cut off", "jsonl.gz", "parquet", "arrayrecord"])
def test_a_damaged_file_is_told_and_not_taken_for_a_shorter_one(tmp_path, name):
    path = tmp_path / f"a.{name.partition(' ')[0]}"
    damaged(name, path)
    with pytest.raises(UserError, match=rf"{path.name}.* (truncated|damaged)"):
        texts_of(path)


def test_frames_of_zstd_are_read_one_after_the_other(tmp_path):
    import zstandard

    pack, skippable = zstandard.ZstdCompressor().compress, b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    parts = [b'{"text": "%s"}\n' % (b"%d" % number * 100_000) for number in range(3)]
    (tmp_path / "a.jsonl.zst").write_bytes(pack(parts[0]) + skippable + pack(parts[1]) + pack(b"") + pack(parts[2]))
    assert [text[0] + str(len(text)) for text in texts_of(tmp_path / "a.jsonl.zst")] == [
        "0100000",
        "1100000",
        "2100000",
    ]


def test_what_json_and_parquet_hold_and_python_does_not_read_is_counted(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet
    from array_record.python.array_record_module import ArrayRecordWriter

    lines = ['{"text": "good"}', '{"text": "a", "n": %s}' % ("1" * 5000), '{"text": "a", "n": %s}' % ("[" * 100_000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    raw = pa.array([b"good", b"\xff"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pyarrow.parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    writer = ArrayRecordWriter(str(tmp_path / "a.arrayrecord"), "group_size:1")
    for record in (b'{"text": "good"}', b"\xff"):
        writer.write(record)
    writer.close()
    for name, counts in (
        ("a.jsonl", {"malformed JSON": 2}),
        ("a.parquet", {"not UTF-8": 1}),
        ("a.arrayrecord", {"not UTF-8": 1}),
    ):
        skipped = SkipCounts()
        found = read(Corpus(name="c", spec=str(tmp_path / name)), skipped)
        assert [document.text for document in found] == ["good"], name
        assert skipped == counts, name


def test_the_last_known_suffix_says_what_a_file_holds(tmp_path):
    for name in ("notes.txt.jsonl", "a.gz.jsonl", "a.jsonl.part"):
        assert texts_of(write_jsonl(tmp_path / name, TEXTS)) == TEXTS, name


def test_a_text_file_of_windows_holds_the_same_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo\r\nlines\r\n".encode())
    assert texts_of(tmp_path / "a.txt") == ["one", "two\nlines"]


def test_groups_that_are_none_or_no_text_are_counted(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    records = [{"text": "a", "book": "1"}, {"text": "b", "book": None}, {"text": "c"}, {"text": "d", "book": 0}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in [*records, {"text": "e", "book": "\ud800"}]))
    pyarrow.parquet.write_table(
        pa.table({"text": list("abcd"), "book": ["1", None, None, "0"]}), tmp_path / "a.parquet"
    )
    for name, counts in (
        ("a.jsonl", {"no group field 'book'": 2, "half a UTF-16 pair": 1}),
        ("a.parquet", {"no group field 'book'": 2}),
    ):
        skipped = SkipCounts()
        found = list(read(Corpus(name="c", spec=str(tmp_path / name), group_field="book"), skipped))
        assert [document.key for document in found] == ["1", "0"], name
        assert skipped == counts, name


def test_a_parquet_column_that_is_not_said_to_be_text_is_read_as_text(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    rows = ["wörter".encode(), b"caf\xe9", b"plain"]
    pyarrow.parquet.write_table(pa.table({"text": pa.array(rows, pa.binary())}), tmp_path / "a.parquet")
    skipped = SkipCounts()
    found = read(Corpus(name="c", spec=str(tmp_path / "a.parquet")), skipped)
    assert [document.text for document in found] == ["wörter", "plain"]
    assert skipped == {"not UTF-8": 1}


def test_held_out_documents_are_never_trained_on(tmp_path):
    texts = english(400)
    records = [{"text": text, "book": f"book {index // 8}"} for index, text in enumerate(texts)]
    # A text of every group once more in another group: whichever is held out, its double must not be learnt.
    records += [{"text": record["text"], "book": "doubles"} for record in records[::8]]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    corpus, holdout = Corpus(name="c", spec=str(path), group_field="book"), Holdout(share=0.3, max_bytes=3000)
    write_heldout(corpus, holdout, tmp_path)
    heldout, skipped = read_heldout(tmp_path), SkipCounts()
    training = list(training_documents(corpus, holdout, tmp_path, skipped))
    assert not set(heldout) & set(training)
    assert 1500 < sum(len(text.encode()) for text in heldout) <= 3000
    assert skipped["equal to a held-out text"] > 0
    assert len(training) + sum(skipped.values()) == len(records)
    # Nor what differs by its white space alone.
    spaced = [{"text": text.replace(" ", " \n") + "\n", "book": "again"} for text in heldout]
    path.write_text(path.read_text() + "".join(json.dumps(record) + "\n" for record in spaced))
    again = SkipCounts()
    assert list(training_documents(corpus, holdout, tmp_path, again)) == training
    assert sum(again.values()) == sum(skipped.values()) + len(spaced)
    # Of a group, all or none is held out.
    learnt = {record["book"] for record in records if record["text"] in set(training)} - {"doubles"}
    assert not any(holdout.holds_out(Document("", book)) for book in learnt)


def test_a_corpus_of_which_nothing_can_be_measured_says_which_setting_helps(tmp_path):
    corpus = Corpus(name="c", spec=str(write_jsonl(tmp_path / "c.jsonl", [f"{n} " * 100 for n in range(100, 130)])))
    with pytest.raises(UserError, match=r"the shortest has 400 bytes.*--domains\.0\.heldout\.max_document_bytes 800"):
        write_heldout(corpus, Holdout(share=0.5, max_document_bytes=300), tmp_path)
    with pytest.raises(
        UserError, match=r"no document fell into the held-out share of 1e-09.*--domains\.0\.heldout\.share"
    ):
        write_heldout(corpus, Holdout(share=1e-9), tmp_path)


@pytest.mark.parametrize(
    ("group", "told"),
    [(None, r"it is one document, .*: cut it into several"), ("book", r"all its documents have the same 'book'")],
)
def test_a_corpus_of_one_document_is_told_to_be_cut_and_may_be_measured_alone(tmp_path, group, told):
    """A larger share would not help: what is held out is not learnt from."""
    records = [{"text": f"page {number}", "book": "one"} for number in range(3 if group else 1)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    corpus = Corpus(name="c", spec=str(tmp_path / "c.jsonl"), group_field=group)
    for share in (0.1, 0.999):
        with pytest.raises(UserError, match=told):
            write_heldout(corpus, Holdout(share=share), tmp_path)
    write_heldout(corpus, Holdout(share=1), tmp_path)
    assert len(read_heldout(tmp_path)) == len(records)
    with pytest.raises(UserError, match=r"x held out\): give more documents"):
        raise nothing_usable(corpus, {"held out": 3})


def test_a_corpus_of_one_text_many_times_is_told_so(tmp_path):
    corpus = Corpus(name="c", spec=str(write_jsonl(tmp_path / "c.jsonl", ["one text"] * 500)))
    with pytest.raises(UserError, match="corpus c: its 500 documents are one text, which is held out or learnt from"):
        write_heldout(corpus, Holdout(), tmp_path)


def test_a_file_whose_name_is_a_pattern_is_itself(tmp_path):
    for name in ("data[1].jsonl", "data1.jsonl"):
        write_jsonl(tmp_path / name, [name])
    for name, expected in (("data[1].jsonl", ["data[1].jsonl"]), ("data[12].jsonl", ["data1.jsonl"])):
        found = read(Corpus(name="c", spec=str(tmp_path / name)), SkipCounts())
        assert [document.text for document in found] == expected


def test_a_corpus_that_grows_keeps_its_held_out_documents(tmp_path):
    corpus = Corpus(name="c", spec=str(write_jsonl(tmp_path / "a.jsonl", english(300))))
    holdout = Holdout(share=0.2, max_bytes=10**6)
    write_heldout(corpus, holdout, tmp_path)
    before = set(read_heldout(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", english(300) + english(300, seed=1))
    write_heldout(corpus, holdout, tmp_path)
    assert before < set(read_heldout(tmp_path))


def test_records_come_back():
    for tokens in ([], [0], [1, 2**31 - 1, 5]):
        ids, learnt = decode_record(encode_record(tokens))
        assert ids.tolist() == tokens
        assert learnt.all()
        ids, learnt = decode_record(encode_record([token | NOT_LEARNT for token in tokens] + [7]))
        assert ids.tolist() == [*tokens, 7]
        assert learnt.tolist() == [False] * len(tokens) + [True]


def test_an_older_manifest_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "zh", "tokens": 5}')
    with pytest.raises(UserError, match="run `cpt data prepare` again"):
        read_manifest(tmp_path)
