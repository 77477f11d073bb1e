"""Malloc's huge pages: asked for where it helps, and the command that is started again is the one that was typed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpt_jax.cli import main
from cpt_jax.core import huge_pages


@pytest.mark.parametrize(
    ("mode", "said", "needed"),
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", None),
        ("[always] madvise never", None, None),
        ("always madvise [never]", None, None),
        (None, None, None),
    ],
)
def test_they_are_asked_for_where_malloc_alone_does_not(
    mode: str | None, said: str | None, needed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if said is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", said)
    if mode is not None:
        (tmp_path / "enabled").write_text(mode)
    assert huge_pages.environment(tmp_path / "enabled") == ({} if needed is None else {"GLIBC_TUNABLES": needed})


def test_the_command_starts_again_once_as_it_was_typed() -> None:
    program = """
import os, sys
from cpt_jax.core import huge_pages
huge_pages.environment = lambda: {} if "AGAIN" in os.environ else {"AGAIN": "yes"}
print(os.getpid(), sys.argv[1:], os.environ.get("AGAIN"), flush=True)
huge_pages.start_again()
"""
    words = [sys.executable, "-X", "utf8", "-c", program, "a b", "--c=*"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ)
    first, second = done.stdout.splitlines()
    process = first.split()[0]
    assert first == f"{process} ['a b', '--c=*'] None"
    assert second == f"{process} ['a b', '--c=*'] yes"


def test_cpt_starts_again_and_a_call_from_python_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[list[str]] = []
    monkeypatch.setattr(huge_pages, "start_again", lambda: begun.append(sys.argv))
    monkeypatch.setattr(sys, "argv", ["cpt", "--help"])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert begun == []
    with pytest.raises(SystemExit):
        main()
    assert begun == [["cpt", "--help"]]
