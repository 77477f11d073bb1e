"""How commands are started whose figures are compared with each other's."""

import os
from pathlib import Path

import pytest

from cpt_jax.cli import main


def environment(place: Path, devices: int = 1) -> dict[str, str]:
    """Of a command that runs in `place`, a directory of a test: so many devices. XLA compiles quickly instead of well, and
    programs are kept, as `cpt` keeps them, for all commands of the session."""
    flags = (
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    )
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(place.parent / "compiled"),
        "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """A command in this process: (exit status, stdout, stderr)."""
    capsys.readouterr()
    try:
        main([str(argument) for argument in arguments])
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    return status, *capsys.readouterr()
