"""What the hardware is known to do."""

import types

import pytest

from cpt_jax.sharding import hardware
from cpt_jax.sharding.hardware import compiling_for, compute_capability, fastest_type


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fma avx2", "float32"),
        ("avx512f avx512_bf16", "bfloat16"),
        ("avx2 amx_bf16 amx_tile", "bfloat16"),
        ("asimd i8mm bf16", "bfloat16"),
    ],
)
def test_a_cpu_multiplies_bfloat16_if_it_has_instructions_for_it(flags, expected, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: fpu {flags}\nbugs : none\n")
    assert fastest_type(cpuinfo) == expected
    assert fastest_type(tmp_path / "nothing") == "float32"
    assert compute_capability() is None
    for other in ("gpu", "tpu"):
        with compiling_for(other):
            assert fastest_type(cpuinfo) == "bfloat16"
            assert compute_capability() == {"gpu": 9, "tpu": None}[other]


@pytest.mark.parametrize(
    ("capability", "number", "expected"),
    [("7.0", 7, "float16"), ("7.5", 7.5, "float16"), ("8.0", 8, "bfloat16"), ("gfx942", None, "bfloat16")],
)
def test_gpus_older_than_ampere_multiply_float16(capability, number, expected, monkeypatch):
    here = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(hardware.jax, "local_devices", lambda: [here])
    with compiling_for("gpu"):
        assert compute_capability() == number
        assert fastest_type() == expected
