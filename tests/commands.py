"""How commands are started whose figures are compared with each other's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpt_jax.cli import main


def without_torch() -> str:
    """PYTHONPATH of a process that has no torch, as where nothing but cpt_jax is installed: transformers would import it, for
    2.5 s of CPU time."""
    paths = str(Path(__file__).parent / "without_torch"), os.environ.get("PYTHONPATH")
    return os.pathsep.join(path for path in paths if path)


def environment(place: Path, devices: int = 1) -> dict[str, str]:
    """Of a command that runs in `place`, a directory of a test: so many devices. XLA compiles as in this process, and
    programs are kept, as `cpt` keeps them, for all commands of the session."""
    return os.environ | {
        "PYTHONPATH": without_torch(),
        "JAX_PLATFORMS": "cpu",
        # Of a flag that is there twice the last counts.
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(place.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    }


def go(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Commands in this process find the recipes of `place`, whichever were read before."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "recipes", raising=False)


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """A command in this process: (exit status, stdout, stderr)."""
    capsys.readouterr()
    try:
        main([str(argument) for argument in arguments])
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    return status, *capsys.readouterr()


def cpt(*arguments, cwd, check=True, **settings) -> subprocess.CompletedProcess:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "cpt_jax", *map(str, arguments)]
    settings |= {"cwd": cwd, "env": environment(cwd)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    assert not check or done.returncode == 0, done.stderr
    return done
