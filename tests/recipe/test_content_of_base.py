"""A base is known by what its files hold, and read again only where they may hold something else."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from cpt_jax.recipe import context
from cpt_jax.recipe.context import RunContext


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
