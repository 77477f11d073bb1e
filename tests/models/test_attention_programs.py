"""Kernels for devices that are not here: that they are in the program, and that a TPU's compiler takes it."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from cpt_jax.models.kernels import attend as attend_module
from cpt_jax.models.kernels.attend import attend
from cpt_jax.models.kernels.visible import Visible
from cpt_jax.sharding.mesh import MeshShape, make_mesh

BFLOAT16 = jnp.dtype("bfloat16")
SOFTMAX, BIASED = "__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax"
# (packed, window, how many documents a row has at most, the program's calls: forward and backward)
CASES = {
    "one document": (False, None, None, [SOFTMAX, f"{SOFTMAX}Backward"]),
    "window": (False, 50, None, [SOFTMAX, f"{SOFTMAX}Backward"]),
    "documents": (True, None, 16, [SOFTMAX, f"{SOFTMAX}Backward"]),
    # Two programs and the mask, of which the device takes one; the mask's is made again in the backward pass.
    "as many documents as there are": (
        True,
        None,
        None,
        [SOFTMAX, SOFTMAX, f"{SOFTMAX}Backward", f"{SOFTMAX}Backward", BIASED, f"{BIASED}Backward"],
    ),
    "documents, window": (True, 50, 16, [BIASED, f"{BIASED}Backward"]),
}


def gradient(window: int | None, documents: int | None, runs: bool = False):
    def summed(q, k, v, begins):
        options = dict(windows=(window,), softcap=None, dtype=BFLOAT16, kernel="cudnn", documents=documents, runs=runs)
        return attend(q, k, v, Visible(begins), **options).sum()

    return jax.jit(jax.grad(summed, argnums=(0, 1, 2)))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(attend_module.jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize("meshed", [False, True], ids=["one device", "mesh"])
@pytest.mark.parametrize(("packed", "window", "documents", "calls"), CASES.values(), ids=CASES)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_gpus_kernel_is_in_the_program(packed, window, documents, calls, meshed):
    q, k = (jax.ShapeDtypeStruct((4, heads, 256, 64), jnp.float32) for heads in (4, 2))
    begins = jax.ShapeDtypeStruct((4, 256), jnp.int32) if packed else None
    with jax.set_mesh(
        make_mesh(shape=MeshShape(replica=2, fsdp=2, tensor=2)) if meshed else make_mesh(jax.devices()[:1])
    ):
        text = gradient(window, documents).trace(q, k, k, begins).lower(lowering_platforms=("cuda",)).as_text()
    assert sorted(re.findall(r"custom_call @(__[\w$.]+)", text)) == sorted(calls)
    assert window is None or packed or f"sliding_window_length\\22: {window}" in text
    # Each device has its own rows and heads.
    assert ("tensor<1x256x2x64xbf16>" if meshed else "tensor<4x256x4x64xbf16>") in text


@pytest.mark.usefixtures("as_on_a_gpu")
def test_values_of_another_width_are_filled_up_for_it():
    """Given otherwise, they would need a Hopper GPU and cuDNN 9.10."""
    q, k, v = (jax.ShapeDtypeStruct((4, 2, 256, width), jnp.float32) for width in (96, 96, 64))
    traced = gradient(None, 16).trace(q, k, v, None)
    assert [each.shape[3] for each in traced.out_info] == [96, 96, 64]
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    call = next(line for line in text.splitlines() if f"@{SOFTMAX}Backward" in line)
    assert "x96xbf16" in call
    assert "x64xbf16" not in call


@pytest.mark.parametrize(("packed", "window", "documents", "calls"), CASES.values(), ids=CASES)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_of_many_runs_it_is_called_once_with_the_rows_of_all(packed, window, documents, calls):
    q, k = (jax.ShapeDtypeStruct((3, 4, heads, 256, 64), jnp.float32) for heads in (4, 2))
    begins = jax.ShapeDtypeStruct((3, 4, 256), jnp.int32) if packed else None
    mapped = jax.jit(jax.vmap(gradient(window, documents, runs=True), in_axes=(0, 0, 0, 0 if packed else None)))
    with jax.set_mesh(make_mesh(jax.devices()[:1])):
        text = mapped.trace(q, k, k, begins).lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"custom_call @(__[\w$.]+)", text)) == set(calls)
    assert "tensor<12x256x4x64xbf16>" in text
    assert not re.search(r"tensor<[34]x[34]x256x[24]x64xbf16>", text)


ON_TPU = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from cpt_jax.models.kernels.attend import attend
from cpt_jax.models.kernels.visible import Visible
from cpt_jax.sharding.mesh import MeshShape, make_mesh
from cpt_jax.sharding.rules import partition_spec

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
shapes = [MeshShape(fsdp=2, tensor=2), MeshShape(context=2, tensor=2)]
jax.default_backend = lambda: "tpu"
cases = [((8, 2), 64, (None,), None), ((9, 3), 64, (None,), None), ((8, 4), 128, (512, None), 50.0), ((4, 2), 256, (None,), None)]
# gpt-oss's heads, which have sinks.
cases.append(((64, 8), 64, (128, None), None))
for shape, ((heads, groups), head_dim, windows, softcap) in [*((shapes[0], case) for case in cases), (shapes[1], cases[2])]:
    mesh = make_mesh(topology.devices, shape)
    def array(dtype, **named):
        axes, shape = tuple(named), tuple(named.values())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition_spec(axes, shape, mesh)))
    q, k = (array(jnp.float32, batch=4, heads=number, sequence=2048, hidden=head_dim) for number in (heads, groups))
    begins, kind = array(jnp.int32, batch=4, sequence=2048), array(jnp.int32)
    sinks = jnp.ones(heads) if heads == 64 else None
    def summed(kernel, q, k, v, begins, kind, runs=False):
        options = dict(windows=windows, softcap=softcap, dtype=jnp.bfloat16, kernel=kernel, runs=runs, sinks=sinks)
        return (attend(q, k, v, Visible(begins, kind), **options) ** 2).sum()
    with jax.set_mesh(mesh):
        sizes = {}
        for kernel in ("splash", "xla"):
            gradient = jax.jit(jax.grad(functools.partial(summed, kernel), argnums=(0, 1, 2)))
            compiled = gradient.trace(q, k, k, begins, kind).lower(lowering_platforms=("tpu",)).compile()
            sizes[kernel] = compiled.memory_analysis().temp_size_in_bytes
            if kernel == "splash":
                text = compiled.as_text()
                for part in ("fwd", "dq", "dkv"):
                    assert f"splash_mha_{part}_segmented" in text, part
        # Of three runs, one call with the rows of all.
        q, k, begins = (
            jax.ShapeDtypeStruct((3, *each.shape), each.dtype, sharding=NamedSharding(mesh, PartitionSpec(None, *each.sharding.spec)))
            for each in (q, k, begins)
        )
        gradient = jax.grad(functools.partial(summed, "splash", runs=True), argnums=(0, 1, 2))
        mapped = jax.jit(jax.vmap(gradient, in_axes=(0, 0, 0, 0, None))).trace(q, k, k, begins, kind)
        compiled = mapped.lower(lowering_platforms=("tpu",)).compile()
        assert "splash_mha_dkv_segmented" in compiled.as_text()
        sizes["of three runs"] = compiled.memory_analysis().temp_size_in_bytes
    print(heads, groups, head_dim, windows, {name: f"{size / 2**20:.0f} MiB" for name, size in sizes.items()})
    assert sizes["splash"] < sizes["xla"] / 10
    assert sizes["of three runs"] < sizes["xla"] / 5
"""


@pytest.mark.slow
def test_a_tpus_compiler_takes_splash_attention_on_a_mesh():
    """For 2 x 2 chips that nobody has to have: libtpu compiles ahead of time (pip install "jax[tpu]")."""
    libtpu = pytest.importorskip("libtpu")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_LIBRARY_PATH": libtpu.get_library_path(),
    }
    done = subprocess.run([sys.executable, "-c", ON_TPU], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("window", [[], ["--window", "50"]], ids=["no window", "window"])
def test_on_a_gpu_its_kernels_are_as_near_to_float32_as_the_reference(window, tmp_path):
    """In a process of its own: the tests' devices are fake CPUs."""
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, "-m", "benchmarks.attention", "--lengths", "256", "--batch", "2", "--repeats", "1"]
    command += ["--compute", "bfloat16", "--out", str(tmp_path / "out.json"), *window]
    subprocess.run(command, env=environment, check=True)
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    done = {(row["kernel"], row["packed"]): row["distance_from_float32"] for row in rows if "refused" not in row}
    assert "cudnn" in {kernel for kernel, _ in done}
    for (kernel, packed), distance in done.items():
        assert distance < 1.5 * done["xla", packed], (kernel, packed)
