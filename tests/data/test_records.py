"""Shards that are truncated, gone or damaged: named, or left out and counted; the order of the others stays."""

import shutil

import numpy as np
import pytest
from loader_inputs import Letters, documents, loader

import cpt_jax.data.prepare as preparation
from cpt_jax.core.errors import UserError
from cpt_jax.data.prepare import prepare, read_manifest
from cpt_jax.data.records import Records

COUNT = 200


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "SHARD_TOKENS", 2000)
    prepare("zh", iter(documents(COUNT, 40, 1000, 7)), Letters(), tmp_path / "zh")
    assert len(read_manifest(tmp_path / "zh").shards) > 2
    return tmp_path / "zh"


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damaged(path):
    """One byte of one of the first documents; the files end in padding."""
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)


def read(source):
    return [source[number] for number in range(len(source))]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            truncated,
            r"train-00001.arrayrecord is truncated: [\d,]+ bytes of [\d,]+ \(documents [\d,]+ to [\d,]+ of zh\)",
        ),
        (lambda path: path.unlink(), "train-00001.arrayrecord is missing"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "train-00001.arrayrecord is too long: "),
    ],
    ids=["truncated", "missing", "too long"],
)
def test_a_broken_shard_is_named_or_its_documents_are_left_out(directory, harm, message, capsys):
    manifest = read_manifest(directory)
    whole = read(Records(directory, manifest, "stop"))
    harm(directory / "train-00001.arrayrecord")
    with pytest.raises(UserError, match=message):
        Records(directory, manifest, "stop")
    rest = Records(directory, manifest, "skip")
    first = manifest.shards["train-00000.arrayrecord"].records
    gone = set(range(first, first + manifest.shards["train-00001.arrayrecord"].records))
    assert read(rest) == [None if number in gone else record for number, record in enumerate(whole)]
    assert rest.skipped == gone
    assert capsys.readouterr().err.count("skipped") == 1


def test_where_no_shard_can_be_read_nothing_is_left_to_go_on_with(directory):
    for path in directory.glob("*.arrayrecord"):
        path.unlink()
    with pytest.raises(UserError, match="no shard of zh can be read"):
        Records(directory, read_manifest(directory), "skip")


def test_a_damaged_record_is_named_and_costs_no_other(directory, capsys):
    manifest = read_manifest(directory)
    whole = read(Records(directory, manifest, "stop"))
    damaged(directory / "train-00000.arrayrecord")
    with pytest.raises(UserError, match=r"train-00000.arrayrecord, record \d+ \(document \d+ of zh\) cannot be read"):
        read(Records(directory, manifest, "stop"))
    rest = Records(directory, manifest, "skip")
    [number] = [number for number, record in enumerate(read(rest)) if record != whole[number]]
    assert rest.skipped == {number}
    assert rest[number] is None
    assert capsys.readouterr().err.count("cannot be read") == 1


def test_training_goes_on_without_a_shard_in_the_order_of_before(directory):
    whole = {"zh": shutil.copytree(directory, directory.parent / "whole")}
    (directory / "train-00001.arrayrecord").unlink()
    setting = dict(mixture={"zh": 1.0}, packing="none", batch_size=1)
    before, batches = loader(whole, **setting), loader({"zh": directory}, unreadable="skip", **setting)
    manifest = read_manifest(directory)
    first = manifest.shards["train-00000.arrayrecord"].records
    gone = set(range(1000 + first, 1000 + first + manifest.shards["train-00001.arrayrecord"].records))
    expected = [next(before)["inputs"] for _ in range(2 * COUNT)]
    kept = [inputs for inputs in expected if inputs[0, 1] not in gone]
    for inputs in kept:
        np.testing.assert_array_equal(next(batches)["inputs"], inputs)
    assert batches.unreadable() == {"zh": len(gone)}


def test_a_reading_thread_that_fails_ends_the_run_with_its_reason(directory):
    damaged(directory / "train-00000.arrayrecord")
    batches = loader({"zh": directory}, {"zh": 1.0})
    with pytest.raises(UserError, match="cannot be read"):
        for _ in range(100):
            next(batches)
