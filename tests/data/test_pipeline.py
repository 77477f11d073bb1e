"""A corpus prepared by one process, by several, with kills, or again: the same bytes; and what others read of them."""

import collections
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from inputs import chinese, english, write_jsonl, write_tokenizer

from cpt_jax.core.errors import UserError
from cpt_jax.data import steps
from cpt_jax.data.cleaning import Cleaning, MeasuredApart
from cpt_jax.data.holdout import Holdout, read_heldout, training_documents, write_heldout
from cpt_jax.data.loader import Loader
from cpt_jax.data.pipeline import _here as here
from cpt_jax.data.pipeline import prepare_by, prepare_corpus
from cpt_jax.data.prepare import MANIFEST, NOT_LEARNT, STATISTICS, decode_record, encode_record, read_manifest
from cpt_jax.data.records import Records
from cpt_jax.data.sources import Corpus, SkipCounts, read
from cpt_jax.data.splits import splits_of
from cpt_jax.data.statistics import length_bin
from cpt_jax.data.steps import Task
from cpt_jax.vocab.tokenizer import Tokenizer

SPLIT = 2500


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two files of text, with doubles in it, and a tokenizer."""
    root = tmp_path_factory.mktemp("prepared")
    write_tokenizer(root / "tokenizer", english(200))
    texts = english(200)
    # Doubles within a split and over splits and files, and one that is nearly another.
    long = " ".join(texts[150:165])
    write_jsonl(root / "a.jsonl", [*texts[:100], *texts[:9], long, f"Says: {long}", *chinese(60)])
    write_jsonl(root / "b.jsonl", [*texts[50:150], "", texts[149]])
    return root


CLEANING = Cleaning(duplicates=True, near_duplicates=0.8, filters=("symbols",), evaluation_words=8)


def task(root: Path, out: Path | str, **changes) -> Task:
    corpus = Corpus(name="mixed", spec=str(root / "?.jsonl"))
    return Task(**(dict(corpus=corpus, place=out, tokenizer=root / "tokenizer") | changes))


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize("cleaning", [Cleaning(), CLEANING], ids=["as it is", "cleaned"])
def test_the_bytes_do_not_depend_on_how_many_prepare(place, tmp_path, cleaning):
    alone = prepare_corpus(task(place, tmp_path / "1", cleaning=cleaning), 1, split_bytes=SPLIT)
    assert len(alone.shards) > 5
    assert prepare_corpus(task(place, tmp_path / "3", cleaning=cleaning), 3, split_bytes=SPLIT) == alone
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert not (tmp_path / "1" / ".work").exists()


def test_the_records_are_the_documents_in_order(place, tmp_path):
    manifest = prepare_corpus(task(place, tmp_path), 1, split_bytes=SPLIT)
    texts = [document.text for document in read(Corpus(name="c", spec=str(place / "?.jsonl")), SkipCounts())]
    expected = Tokenizer(place / "tokenizer").encode_documents(texts)
    records = Records(tmp_path, manifest, "stop")
    assert [decode_record(records[number])[0].tolist() for number in range(len(records))] == expected
    assert manifest.tokens == sum(map(len, expected))
    assert manifest.bytes == sum(len(text.encode()) for text in texts)
    assert manifest.skipped == {"empty": 1}
    statistics = json.loads((tmp_path / STATISTICS).read_text())
    lengths = collections.Counter(str(length_bin(len(ids))) for ids in expected)
    assert statistics["token_lengths"] == lengths
    assert statistics["character_lengths"] == collections.Counter(str(length_bin(len(text))) for text in texts)
    assert lengths != statistics["character_lengths"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_where_a_text_was_cut_its_last_token_is_not_to_be_learnt(place, tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet

    # What is not just true says nothing.
    marks = [True, False, None, True, "true", 1]
    rows = [{"text": text, "truncated": mark} for text, mark in zip(english(6), marks, strict=True)]
    if kind == "parquet":
        rows = [row | {"truncated": row["truncated"] is True} for row in rows]
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "cut.parquet")
    else:
        (tmp_path / "cut.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = Corpus(name="cut", spec=str(tmp_path / f"cut.{kind}"))
    manifest = prepare_corpus(task(place, tmp_path / "out", corpus=corpus), 1)
    records = Records(tmp_path / "out", manifest, "stop")
    tokenizer = Tokenizer(place / "tokenizer")
    for row, record in zip(rows, records.read(range(6)), strict=True):
        tokens, learnt = decode_record(record)
        assert tokens.tolist() == tokenizer.encode(row["text"])
        assert learnt[:-1].all()
        assert learnt[-1] == (row["truncated"] is not True)
    assert manifest.tokens - manifest.trained_tokens == 2


def test_tfds_reads_it_and_writes_the_same_examples(place, tmp_path):
    import tensorflow_datasets as tfds

    manifest = prepare_corpus(task(place, tmp_path), 1, split_bytes=SPLIT)
    builder = tfds.builder_from_directory(str(tmp_path))
    source = builder.as_data_source(split="train")
    records = Records(tmp_path, manifest, "stop")
    assert len(source) == manifest.records == builder.info.splits["train"].num_examples
    for number in range(manifest.records):
        tokens = source[number]["tokens"]
        assert tokens.dtype == np.uint32
        np.testing.assert_array_equal(tokens, decode_record(records[number])[0])
    # Every length of the length fields.
    for count in (0, 1, 31, 32, 33, 4000, 5000, 600_000):
        tokens = np.arange(count, dtype=np.uint32) | np.uint32(NOT_LEARNT)
        assert builder.info.features.serialize_example({"tokens": tokens}) == encode_record(tokens)
        np.testing.assert_array_equal(decode_record(encode_record(tokens))[0], np.arange(count))
        assert not decode_record(encode_record(tokens))[1].any()
    assert "tensorflow" not in sys.modules


def test_what_is_left_out_is_counted_with_samples(place, tmp_path):
    write_jsonl(tmp_path / "held.jsonl", [english(200)[20]])
    cleaning = Cleaning(
        duplicates=True, near_duplicates=0.8, evaluation_sets=(str(tmp_path / "held.jsonl"),), evaluation_words=5
    )
    manifest = prepare_corpus(task(place, tmp_path / "out", cleaning=cleaning), 1, split_bytes=SPLIT)
    assert manifest.skipped["empty"] == 1
    # a's first nine, b's first fifty, and the last of b; and one that is nearly the one before it.
    assert manifest.skipped["duplicate"] == 9 + 50 + 1
    assert manifest.skipped["near duplicate"] == 1
    assert manifest.skipped["5 words in a row of held"] >= 1
    total = sum((place / f"{file}.jsonl").read_text().count("\n") for file in "ab")
    assert manifest.records + sum(manifest.skipped.values()) == total
    left_out = json.loads((tmp_path / "out" / "statistics.json").read_text())["left_out"]
    assert left_out["near duplicate"][0][1].startswith("Says: ")
    assert english(200)[20] in [text for _, text in left_out["5 words in a row of held"]]
    assert len(left_out["duplicate"]) == 20


def test_held_out_documents_are_left_out_as_before(place, tmp_path):
    corpus, holdout = Corpus(name="mixed", spec=str(place / "?.jsonl")), Holdout(share=0.3)
    write_heldout(corpus, holdout, tmp_path)
    skipped = SkipCounts()
    expected = list(training_documents(corpus, holdout, tmp_path, skipped))
    apart = MeasuredApart(holdout=holdout, directory=tmp_path)
    manifest = prepare_corpus(task(place, tmp_path, apart=apart), 2, split_bytes=SPLIT)
    assert manifest.records == len(expected)
    assert manifest.skipped == skipped
    # A text that begins as a held-out one does is left out where it is asked for.
    write_jsonl(tmp_path / "c.jsonl", [text + " a new end" for text in read_heldout(tmp_path)])
    excerpts = Corpus(name="c", spec=str(tmp_path / "c.jsonl"))
    cleaning = Cleaning(evaluation_words=4)
    with pytest.raises(UserError, match=r"no usable document .* x 4 words in a row of what is held out of mixed"):
        prepare_corpus(
            task(place, tmp_path / "c", corpus=excerpts, cleaning=cleaning, measured=(("mixed", tmp_path),)), 1
        )


def test_what_is_done_is_not_done_again_and_what_changed_is(place, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", english(100))
    given = task(tmp_path, tmp_path / "out", tokenizer=place / "tokenizer")
    first = prepare_corpus(given, 1, split_bytes=SPLIT)
    before = contents(tmp_path / "out")

    def fails(*_):
        raise AssertionError("done again")

    with monkeypatch.context() as patched:
        patched.setattr(steps, "write", fails)
        assert prepare_corpus(given, 1, split_bytes=SPLIT) == first
    assert contents(tmp_path / "out") == before
    write_jsonl(tmp_path / "a.jsonl", english(20))
    assert prepare_corpus(given, 1, split_bytes=SPLIT).records == 20
    # A shard that is damaged in its size is made again.
    (tmp_path / "out" / "train-00000.arrayrecord").write_bytes(b"")
    again = prepare_corpus(given, 1, split_bytes=SPLIT)
    assert (tmp_path / "out" / "train-00000.arrayrecord").stat().st_size == again.shards[
        "train-00000.arrayrecord"
    ].bytes
    assert sorted(path.name for path in (tmp_path / "out").glob("train-*")) == sorted(again.shards)


def test_all_that_decides_the_shards_tells_two_tasks_apart(place, tmp_path):
    for name in ("tokenizer", "other"):
        write_tokenizer(tmp_path / name, english(200 if name == "tokenizer" else 100), kind="qwen")
    # The same tokens, and other words for a chat.
    for name, named in (
        ("template", {"chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"}),
        ("eos", {"eos_token": "<think>"}),
    ):
        shutil.copytree(tmp_path / "tokenizer", tmp_path / name)
        settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text()) | named
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}")
    write_jsonl(tmp_path / "evaluation.jsonl", english(3))
    texts, talk = Corpus(name="mixed", spec=str(place / "?.jsonl")), tmp_path / "talk.jsonl"
    talk.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    chat = Corpus(name="mixed", spec=str(talk), format="chat")
    evaluation = Cleaning(evaluation_words=5, evaluation_sets=(str(tmp_path / "evaluation.jsonl"),))
    write_heldout(texts, Holdout(share=0.3), tmp_path / "held")
    write_heldout(texts, Holdout(share=0.5), tmp_path / "other held")

    def of(corpus: Corpus = texts, size: int = SPLIT, **changes) -> str:
        steps.tools_of.cache_clear()
        given = task(place, tmp_path, corpus=corpus, **({"tokenizer": tmp_path / "tokenizer"} | changes))
        return steps.identity(given, splits_of(corpus, size))

    def apart(share: float, directory: str) -> MeasuredApart:
        return MeasuredApart(holdout=Holdout(share=share), directory=tmp_path / directory)

    found = {
        "text": of(),
        "larger splits": of(size=2 * SPLIT),
        "another tokenizer": of(tokenizer=tmp_path / "other"),
        "none": of(tokenizer=None),
        "another field": of(dataclasses.replace(texts, text_field="body")),
        "cleaned": of(cleaning=CLEANING),
        "without doubles": of(cleaning=Cleaning(duplicates=True)),
        "against an evaluation set": of(cleaning=evaluation),
        "held out": of(apart=apart(0.3, "held")),
        "by another share": of(apart=apart(0.4, "held")),
        "other texts": of(apart=apart(0.3, "other held")),
        "chat": of(chat),
        "by another template": of(chat, template=tmp_path / "chat.jinja"),
        "by the tokenizer's own": of(chat, tokenizer=tmp_path / "template"),
        "with another end": of(chat, tokenizer=tmp_path / "eos"),
    }
    assert len(set(found.values())) == len(found)
    assert of() == of(tokenizer=tmp_path / "eos") == found["text"]
    write_jsonl(tmp_path / "evaluation.jsonl", english(4))
    assert of(cleaning=evaluation) != found["against an evaluation set"]
    # As large as it was.
    before = talk.read_text()
    talk.write_text(before.replace('"b"', '"c"'))
    os.utime(talk, (1, 1))
    assert of(chat) != found["chat"]


@pytest.mark.parametrize("cleaning", [Cleaning(), CLEANING], ids=["as it is", "cleaned"])
def test_a_store_holds_the_same(place, tmp_path, cleaning):
    import fsspec

    store = fsspec.filesystem("memory")
    for file in ("a.jsonl", "b.jsonl"):
        store.pipe_file(f"/{tmp_path.name}/text/{file}", (place / file).read_bytes())
    here = prepare_corpus(task(place, tmp_path / "out", cleaning=cleaning), 1, split_bytes=SPLIT)
    corpus = Corpus(name="mixed", spec=f"memory://{tmp_path.name}/text/*.jsonl")
    given = task(place, tmp_path, corpus=corpus, cleaning=cleaning, place=f"memory://{tmp_path.name}/out")
    there = prepare_corpus(given, 1, split_bytes=SPLIT)
    # It was made from other files.
    assert dataclasses.replace(there, source=here.source) == here
    found = {
        str(Path(path).relative_to(f"/{tmp_path.name}/out")): store.cat_file(path)
        for path in store.find(f"/{tmp_path.name}/out")
    }
    expected = contents(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == {"manifest.json"}
    assert prepare_corpus(given, 1, split_bytes=SPLIT) == there


WRITTEN = ".work/written-" + "[0-9]" * 5
SCRIPT = """
import sys
from pathlib import Path
from cpt_jax.data.pipeline import prepare_corpus
from cpt_jax.data.sources import Corpus
from cpt_jax.data.cleaning import Cleaning
from cpt_jax.data.steps import Task
corpus, tokenizer, out, workers = sys.argv[1:]
cleaning = Cleaning(duplicates=True)
task = Task(corpus=Corpus(name="c", spec=corpus), place=Path(out), tokenizer=Path(tokenizer), cleaning=cleaning)
prepare_corpus(task, int(workers), split_bytes=20_000)
"""


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_kill_costs_what_was_not_done(place, tmp_path, workers):
    corpus = write_jsonl(tmp_path / "a.jsonl", english(6000))
    command = [sys.executable, "-c", SCRIPT, corpus, place / "tokenizer"]
    subprocess.run([*command, tmp_path / "whole", "1"], check=True)
    out = tmp_path / "killed"
    process = subprocess.Popen([*command, out, str(workers)])
    while len(list(out.glob(WRITTEN))) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    workers_of_it = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Those that worked for it end too.
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/stat").exists() for pid in workers_of_it) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}/stat").exists() for pid in workers_of_it)
    assert not (out / "manifest.json").exists()
    done = [path.name.removeprefix("written-") for path in out.glob(WRITTEN)]
    assert 3 <= len(done) < len(read_manifest(tmp_path / "whole").shards)
    times = {name: (out / f"train-{name}.arrayrecord").stat().st_mtime_ns for name in done}
    subprocess.run([*command, out, str(workers)], check=True)
    assert contents(out) == contents(tmp_path / "whole")
    assert times == {name: (out / f"train-{name}.arrayrecord").stat().st_mtime_ns for name in done}


def test_ctrl_c_ends_all_processes_without_their_tracebacks(place, tmp_path, monkeypatch):
    # One process is at its last split for long, the other has nothing to do any more.
    (tmp_path / "slow.py").write_text("import time\ndef wait(text):\n    time.sleep(60 * (text == 'slow'))\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    corpus, out = write_jsonl(tmp_path / "a.jsonl", [*english(600), "slow"]), tmp_path / "out"
    # What a shell starts in the background is not to hear of Ctrl-C, nor is what comes of it.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script = heard + SCRIPT.replace("duplicates=True", 'filters=("slow:wait",)')
    command = [sys.executable, "-c", script, corpus, place / "tokenizer", out, "2"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    splits = -(-corpus.stat().st_size // 20_000)
    while len(list(out.glob(WRITTEN))) < splits - 1:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=20)
    # The first process's own, of which the command line makes one line.
    assert told.rstrip().endswith("KeyboardInterrupt")
    assert "SpawnProcess" not in told


def test_two_tasks_at_once_in_one_place_do_not_mix(place, tmp_path):
    write_tokenizer(tmp_path / "other", chinese(200))
    one, other = task(place, tmp_path / "out"), task(place, tmp_path / "out", tokenizer=tmp_path / "other")
    with pytest.raises(UserError, match=r"another process prepares data in .*out: wait for it, or choose another"):
        prepare_by(one, splits_of(one.corpus), lambda *_: prepare_by(other, splits_of(other.corpus), here))
    first = prepare_corpus(one, 1)
    assert first.tokenizer == Tokenizer(place / "tokenizer").fingerprint
    assert not (tmp_path / "out" / ".lock").exists()


def test_in_a_store_neither_of_two_tasks_takes_the_others_shards_for_its_own(place, tmp_path):
    write_tokenizer(tmp_path / "other", chinese(200))
    one = task(place, f"memory://{tmp_path.name}/out")
    other, splits = dataclasses.replace(one, tokenizer=tmp_path / "other"), splits_of(one.corpus)

    def overtaken(what: str, step, given: Task, among) -> None:
        here(what, step, given, among)
        second = steps.identified(other, splits)
        steps.begin(second, splits)
        steps.write(second, splits[0])

    with pytest.raises(UserError, match=r"something else was prepared in memory://.*at the same time"):
        prepare_by(one, splits, overtaken)
    assert prepare_by(other, splits, here).tokenizer == Tokenizer(tmp_path / "other").fingerprint


def test_a_file_whose_name_is_no_utf8(place, tmp_path):
    shutil.copy(place / "b.jsonl", tmp_path / os.fsdecode(b"caf\xe9.jsonl"))
    corpus = Corpus(name="mixed", spec=str(tmp_path / "*.jsonl"))
    named = dataclasses.replace(corpus, spec=str(tmp_path / os.fsdecode(b"caf\xe9.jsonl")))
    for each in (corpus, named):
        assert prepare_corpus(task(place, tmp_path / "out", corpus=each), 2, split_bytes=SPLIT).records == 101


def test_what_another_version_prepared_is_told(place, tmp_path):
    prepare_corpus(task(place, tmp_path), 1)
    path = tmp_path / MANIFEST
    written = json.loads(path.read_text())
    others = [
        {name: value for name, value in written.items() if name != "trained_tokens"},
        # As first versions had them: the checksum alone.
        written | {"shards": {name: shard["sha256"] for name, shard in written["shards"].items()}},
    ]
    for other in others:
        path.write_text(json.dumps(other))
        with pytest.raises(UserError, match="was prepared by another version of cpt_jax: run `cpt data prepare` again"):
            read_manifest(tmp_path)


def test_another_tokenizer_is_told(place, tmp_path):
    prepare_corpus(task(place, tmp_path / "out"), 1)
    other = write_tokenizer(tmp_path / "other", chinese(50)) or Tokenizer(tmp_path / "other")
    with pytest.raises(UserError, match="was prepared with another tokenizer: run `cpt data prepare` with this one"):
        Loader(
            {"mixed": 1.0},
            {"mixed": tmp_path / "out"},
            sequence_length=32,
            batch_size=1,
            start_id=0,
            end_id=0,
            tokenizer=other.fingerprint,
            seed=0,
        )


def test_a_corpus_without_documents_is_told(place, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n{"body": 1}\n')
    with pytest.raises(
        UserError, match=r"mixed=.*no usable document \(1 x empty, 1 x no text field 'text'\): give one"
    ):
        prepare_corpus(task(tmp_path, tmp_path / "out", tokenizer=place / "tokenizer"), 1)
    with pytest.raises(UserError, match="--workers is 0"):
        prepare_corpus(task(place, tmp_path / "out"), 0)


def test_a_worker_that_is_killed_is_told(place, tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text("import os, signal\ndef end(text):\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(tmp_path)
    cleaning = Cleaning(filters=("deadly:end",))
    with pytest.raises(UserError, match=r"ended too early .*fewer --workers"):
        prepare_corpus(task(place, tmp_path / "out", cleaning=cleaning), 2, split_bytes=SPLIT)
