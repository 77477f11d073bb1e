"""What the hardware is known to do."""

import pytest

from cpt_jax.sharding.hardware import compiling_for, multiplies_bfloat16


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fma avx2", False), ("avx512f avx512_bf16", True), ("avx2 amx_bf16 amx_tile", True), ("asimd i8mm bf16", True)],
)
def test_a_cpu_multiplies_bfloat16_if_it_has_instructions_for_it(flags, expected, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: fpu {flags}\nbugs : none\n")
    assert multiplies_bfloat16(cpuinfo) is expected
    assert not multiplies_bfloat16(tmp_path / "nothing")
    with compiling_for("gpu"):
        assert multiplies_bfloat16(cpuinfo)
