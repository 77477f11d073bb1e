"""A base is known by what its files hold, and read again only where they may hold something else."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from inputs import chinese, english, write_jsonl
from safetensors.numpy import load_file, save_file

from cpt_jax.core.errors import UserError
from cpt_jax.data.holdout import Holdout
from cpt_jax.data.sources import Corpus
from cpt_jax.recipe import context
from cpt_jax.recipe import run as runs
from cpt_jax.recipe.context import RunContext
from cpt_jax.recipe.recipe import Context, Domain, Evaluation, Recipe, Vocabulary
from cpt_jax.recipe.stations import Workdir
from cpt_jax.vocab.extend import ContinuedBPE
from cpt_jax.vocab.gate import Limits
from cpt_jax.vocab.init_rows import Wechsel


@pytest.fixture
def run(tmp_path):
    (tmp_path / "base").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "base" / name).write_text(name)
    workdir: Any = SimpleNamespace(path=tmp_path)
    run = RunContext(SimpleNamespace(), workdir)  # type: ignore[arg-type]
    run.source = tmp_path / "base"
    return run


def test_other_content_is_another_base_and_a_copy_is_the_same(run, tmp_path):
    first = run._content_of_base()
    os.utime(run.source / "model.safetensors", ns=(1, 1))
    assert run._content_of_base() == first
    (run.source / "README.md").write_text("A card")
    (tmp_path / "elsewhere").mkdir()
    for file in run.source.iterdir():
        (tmp_path / "elsewhere" / file.name).write_bytes(file.read_bytes())
    run.source = tmp_path / "elsewhere"
    assert run._content_of_base() == first
    (run.source / "model.safetensors").write_text("Other weights")
    assert run._content_of_base() != first


def test_what_was_not_touched_is_not_read_again(run, monkeypatch):
    first = run._content_of_base()
    monkeypatch.setattr(context, "checksums", None)
    assert run._content_of_base() == first


def recipe(tmp_path: Path, tiny_model: Path, **changes: Any) -> Recipe:
    shutil.copytree(tiny_model, tmp_path / "base")
    zh = write_jsonl(tmp_path / "zh.jsonl", chinese(150))
    domain = Domain(corpus=Corpus(name="zh", spec=str(zh)), role="new", heldout=Holdout(share=0.2, max_bytes=2000))
    evaluation = Evaluation(sequence_length=64)
    return Recipe(name="r", base=str(tmp_path / "base"), domains=(domain,), stages=(), evaluation=evaluation, **changes)


@pytest.mark.parametrize("longer", [None, Context(length=512)], ids=["as it is", "longer"])
def test_what_was_written_through_its_link_is_not_exported(tmp_path, tiny_model, longer):
    given, workdir = recipe(tmp_path, tiny_model, context=longer), tmp_path / "run"
    file, as_it_was = tmp_path / "base" / "model.safetensors", tmp_path / "as it was"
    shutil.copy2(file, as_it_was)
    save_file({name: value / 2 for name, value in load_file(file).items()}, tmp_path / "other", {"format": "pt"})
    runs.run(given, workdir, only="train")

    def exported(name: str) -> bytes:
        runs.export_run(workdir, tmp_path / name, {})
        return (tmp_path / name / "model.safetensors").read_bytes()

    def is_refused() -> None:
        with pytest.raises(UserError, match=r"run/base is not what was trained on: .*put these back, remove "):
            exported("refused")
        assert not (tmp_path / "refused").exists()

    first = exported("first")
    shutil.copyfile(tmp_path / "other", file)
    is_refused()
    # The old one under the user's name is not yet the run's.
    file.unlink()
    shutil.copy2(as_it_was, file)
    is_refused()
    shutil.rmtree(workdir / "base")
    runs.run(given, workdir, only="train")
    assert exported("again") == first
    # What takes the name of the user's file leaves the run's as it is.
    (tmp_path / "other").replace(file)
    assert exported("later") == first


def test_rows_are_made_anew_from_other_word_vectors(tmp_path, tiny_model):
    """And not from the same ones."""

    def write_vectors(dimensions: str) -> None:
        for name, texts in (("en", english(50)), ("zh", chinese(150))):
            words = sorted({word for text in texts for word in text.split()})
            (tmp_path / f"{name}.vec").write_text("".join(f"{word} {dimensions}\n" for word in words))

    write_vectors("0.5 0.25")
    rows = Wechsel(source=str(tmp_path / "en.vec"), target=str(tmp_path / "zh.vec"))
    limits = Limits(unreachable_pieces=1.0)
    grown = Vocabulary(extension=ContinuedBPE(new_tokens=20), initial_rows=rows, limits=limits)
    given = recipe(tmp_path, tiny_model, vocabulary=grown)

    def was_done() -> bool:
        with Workdir(tmp_path / "run", given) as workdir:
            pipeline = runs.Pipeline(given, workdir)
            pipeline.resolve()
            pipeline.hold_out(given.domains[0])
            pipeline.vocabulary()
            return workdir.was_done("base-model")

    assert not was_done()
    assert was_done()
    write_vectors("0.25 0.5 ")
    assert not was_done()
