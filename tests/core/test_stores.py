"""Directories in stores: on a server that speaks S3, and in memory."""

import gzip
import logging
from collections import Counter

import pytest
from store_server import s3_server

from cpt_jax.core.errors import UserError
from cpt_jax.core.stores import Store, file_system, glob_addresses, location, state_of, written_to
from cpt_jax.data.sources import Corpus, files_of, read


@pytest.fixture(scope="module", params=["memory", "s3"])
def root(request):
    """The address of an empty store."""
    if request.param == "memory":
        yield "memory://bucket"
    else:
        with s3_server():
            yield "s3://bucket"


def test_what_is_put_comes_back(root, tmp_path):
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "a.txt").write_text("one")
    (tmp_path / "out" / "deep" / "b.txt").write_text("two")
    store = Store(f"{root}/there")
    listed = store.upload(tmp_path / "out", (path for path in (tmp_path / "out").rglob("*") if path.is_file()))
    assert store.names() == ["a.txt", "deep/b.txt"] == sorted(listed)
    assert store.fetch(tmp_path / "back", listed) == []
    assert (tmp_path / "back" / "deep" / "b.txt").read_text() == "two"
    # What is there is not fetched again; what is no longer what it was is told, and not taken.
    before = (tmp_path / "back" / "a.txt").stat().st_mtime_ns
    store.write("deep/b.txt", b"another")
    (tmp_path / "back" / "deep" / "b.txt").write_text("damaged")
    assert store.fetch(tmp_path / "back", listed) == ["deep/b.txt"]
    assert (tmp_path / "back" / "a.txt").stat().st_mtime_ns == before
    store.remove("deep")
    store.remove("not there")
    assert store.names() == ["a.txt"]
    assert store.read("deep/b.txt") is None


def test_of_two_that_create_a_file_one_does(root):
    store = Store(f"{root}/one")
    assert store.create("name", b"first")
    assert not store.create("name", b"second")
    assert store.read("name") == b"first"


def test_a_corpus_is_read_where_it_lies(root):
    store = Store(f"{root}/corpora")
    store.write("zh-0.jsonl.gz", gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    store.write("zh-1.jsonl", b'{"text": "three"}\n')
    corpus = Corpus(name="zh", spec=f"{root}/corpora/zh-*")
    assert [document.text for document in read(corpus, Counter())] == ["one", "two", "three"]
    assert files_of(corpus) == glob_addresses(f"{root}/corpora/zh-*")
    before = state_of(f"{root}/corpora/zh-1.jsonl")
    assert before == state_of(f"{root}/corpora/zh-1.jsonl")
    store.write("zh-1.jsonl", b'{"text": "other"}\n')
    assert before != state_of(f"{root}/corpora/zh-1.jsonl")
    with pytest.raises(UserError, match="there is no such file"):
        files_of(Corpus(name="zh", spec=f"{root}/corpora/en-*"))


def test_what_is_written_is_there_when_it_is_whole(root):
    def fail() -> None:
        with written_to(f"{root}/halves/out") as local:
            local.mkdir()
            (local / "first").write_text("1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert Store(f"{root}/halves").names() == []
    with written_to(f"{root}/halves/out") as local:
        local.mkdir()
        (local / "first").write_text("1")
    assert Store(f"{root}/halves").names() == ["out/first"]


def test_a_store_whose_refusals_are_told_does_not_log_them(monkeypatch):
    log = logging.getLogger("gcsfs")
    monkeypatch.setattr(log, "level", logging.NOTSET)
    file_system("memory://anything")
    assert not log.isEnabledFor(logging.ERROR)
    # GCSFS_DEBUG=DEBUG does this.
    monkeypatch.setattr(log, "level", logging.DEBUG)
    file_system("memory://anything")
    assert log.level == logging.DEBUG


def test_a_place_to_write_to_is_looked_at_once(monkeypatch):
    """By `refuse_existing`, before hours of work: a listing of a store costs time."""
    monkeypatch.setattr(Store, "names", lambda *_: pytest.fail("listed"))
    with written_to("memory://once/out") as local:
        local.mkdir()


def test_an_address_keeps_its_slashes():
    assert location("s3://bucket/run/") == "s3://bucket/run"
    assert str(location("runs/x/")) == "runs/x"


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match="pip install"):
        Store("abfs://container/run")
    with pytest.raises(UserError, match="give a path"):
        Store("nonsense://bucket")
