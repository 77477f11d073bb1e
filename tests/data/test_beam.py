"""Apache Beam's local runner of several processes writes what this machine writes alone. Skipped where Beam is not
installed: `make test-beam`."""

import sys

import pytest
from inputs import chinese, english, write_jsonl, write_tokenizer

from cpt_jax.core.errors import UserError
from cpt_jax.data.beam import prepare_with_beam
from cpt_jax.data.cleaning import Cleaning
from cpt_jax.data.pipeline import prepare_corpus
from cpt_jax.data.sources import Corpus
from cpt_jax.data.steps import Task


def test_beam_writes_the_same_bytes(tmp_path):
    pytest.importorskip("apache_beam", exc_type=ImportError)
    write_tokenizer(tmp_path / "tokenizer", english(200))
    write_jsonl(tmp_path / "a.jsonl", [*english(100), *english(30), *chinese(60)])
    corpus = Corpus(name="c", spec=str(tmp_path / "a.jsonl"))
    for name, cleaning in (("plain", Cleaning()), ("cleaned", Cleaning(duplicates=True, near_duplicates=0.8))):
        here, there = (
            Task(corpus=corpus, place=tmp_path / name / where, tokenizer=tmp_path / "tokenizer", cleaning=cleaning)
            for where in ("here", "beam")
        )
        alone = prepare_corpus(here, 1, split_bytes=2500)
        assert len(alone.shards) > 5
        assert prepare_with_beam(there, "DirectRunner", [], 2, split_bytes=2500) == alone
        files = {path.name: path.read_bytes() for path in (tmp_path / name / "here").iterdir()}
        assert {path.name: path.read_bytes() for path in (tmp_path / name / "beam").iterdir()} == files


def test_without_beam_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    task = Task(corpus=Corpus(name="c", spec="a.jsonl"), place=tmp_path, tokenizer=None)
    with pytest.raises(UserError, match="--runner flink needs Apache Beam: pip install apache-beam"):
        prepare_with_beam(task, "flink", [], None)
