"""Plans of small stages for CPU devices: memory against the compiler's and the arrays' own, and what is refused."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from inputs import hf_config, random_weights, tiny_config

from cpt_jax.adapt import Embeddings, Full, LoRA
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.tree import flatten
from cpt_jax.models.remat import Remat
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.plan.command import Wanted, stage_of_model
from cpt_jax.plan.hardware import Hardware, hardware_named
from cpt_jax.plan.plan import explain, plan_stage
from cpt_jax.plan.search import candidate_of, candidates
from cpt_jax.plan.stage import PlannedStage, compile_stage, program_text
from cpt_jax.recipe.recipe import Stage
from cpt_jax.sharding.hardware import backend, compiling_for
from cpt_jax.sharding.mesh import MeshShape, make_mesh
from cpt_jax.training.flops import token_flops
from cpt_jax.training.program import Settings
from cpt_jax.training.training import place_weights

SIZES = dict(hidden_size=64, intermediate_size=192, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, new_rows=16)
LORA = LoRA(rank=4, alpha=8)


def planned(method, *, batch_size=8, **changes) -> PlannedStage:
    config = method.layout(tiny_config(**SIZES))
    settings = dict(
        name="stage",
        method=method,
        mixture={"text": 1.0},
        tokens=10_000,
        batch_size=batch_size,
        sequence_length=128,
        optimizer=AdamW(learning_rate=1e-3),
    )
    stage = Stage(**(settings | changes))
    return PlannedStage(stage=stage, config=config, hf_config=hf_config(config), layer_loop="scan")


@pytest.mark.parametrize("method", [Full(), LORA, Embeddings(rows="new")], ids=["full", "lora", "new rows"])
@pytest.mark.parametrize("shape", [MeshShape(), MeshShape(fsdp=4, tensor=2)], ids=str)
def test_memory_is_what_the_compiler_counts_and_what_the_arrays_take(method, shape):
    stage = planned(method, ema=EMA())
    plan = plan_stage(stage, hardware_named("cpu-8"), shape)
    memory, compiled = plan.memory, plan.compiled
    held = memory.weights + memory.optimizer + memory.ema + memory.batch
    # Of one device, as XLA counts arguments: to a few bytes of controls and alignment.
    assert held == pytest.approx(compiled.arguments, abs=512)
    # And as they lie on the devices in a run.
    network, trains = compiled.network, method.trains
    weights = random_weights(network.config) if method.lora_config() is None else zeros(network)
    paths = frozenset(path for path in flatten(network.shapes) if trains(path))
    program = Settings(
        network=network,
        trains=paths,
        names=("text",),
        optimizer=stage.stage.optimizer,
        ema=EMA(),
        compute="bfloat16",
        mesh=make_mesh(shape=shape),
    ).program()
    trainable, frozen = place_weights(weights, trains, stage.precision, program.where)
    state = program.begin(trainable)
    here = jax.devices()[0]
    for count, tree in (
        (memory.weights, (state.trainable, frozen)),
        (memory.optimizer, state.optimizer_state),
        (memory.ema, state.average),
    ):
        parts = [part for leaf in jax.tree.leaves(tree) for part in leaf.addressable_shards if part.device == here]
        assert count == sum(part.data.nbytes for part in parts)


def zeros(network):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), network.shapes)


@pytest.mark.parametrize("method", [Full(), LORA, Embeddings(rows="new")], ids=["full", "lora", "new rows"])
def test_the_program_computes_what_the_model_needs(method):
    stage = planned(method)
    plan = plan_stage(stage, hardware_named("cpu-1"))
    line, network = plan.roofline, plan.compiled.network
    assert line is not None
    per_token = token_flops(network, method.trains, 128).total
    assert line.model_flops == per_token * 8 * 128
    # The reference attention computes the other half of the scores too.
    assert line.model_flops < line.flops < 1.35 * line.model_flops


def test_rematerialisation_shows_in_the_plan():
    kept, again = (plan_stage(planned(Full(), remat=remat), hardware_named("cpu-8")) for remat in (None, Remat()))
    assert again.memory.activations < 0.5 * kept.memory.activations
    assert again.memory.activations == pytest.approx(4 * 4 * 128 * 64, rel=0.1)
    assert kept.roofline is not None
    assert again.roofline is not None
    assert again.roofline.flops > 1.15 * kept.roofline.flops


def test_weights_are_gathered_along_fsdp_and_activations_summed_along_tensor():
    plan = plan_stage(planned(Full()), hardware_named("cpu-8"), MeshShape(fsdp=4, tensor=2))
    along = {(each.kind, each.axes) for each in plan.collectives}
    assert ("all-gather", ("fsdp",)) in along
    assert ("all-reduce", ("tensor",)) in along
    sent = sum(each.sent for each in plan.collectives if each.axes == ("fsdp",))
    # Paper has each weight gathered twice and each gradient scattered once; what is small (norms) comes on top.
    assert 0.5 * plan.paper.sent["fsdp"] < sent < 3 * plan.paper.sent["fsdp"]


def test_figures_are_what_the_command_promises():
    plan = plan_stage(planned(LORA), hardware_named("cpu-8"), price=2.0)
    figures = json.loads(json.dumps(plan.figures()))
    assert figures["fits"]
    assert {"weights", "optimizer", "ema", "activations", "total", "limit"} <= figures["bytes_per_chip"].keys()
    assert figures["steps"] == 10
    assert {"kind", "axes", "sent", "count"} <= figures["collectives"][0].keys()
    assert "stage stage" in explain(plan)


def test_what_is_planned_is_what_is_compiled_for():
    assert backend() == "cpu"
    with compiling_for("tpu"):
        assert backend() == "tpu"
    assert backend() == "cpu"
    assert planned(Full()).network("tpu").config.attention == "splash"
    assert planned(Full()).network("cpu").config.attention == "xla"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9-8", "hardware 'v9-8' is not known"),
        ("v5p", "write it as in"),
        ("v5p-127", "counts TensorCores"),
        ("v5e-512", "at most 256"),
        ("v5e:4x4x4", "there is no such slice"),
        ("h100-12", "in machines of 8"),
        ("cpu-0", "give the number of devices"),
    ],
)
def test_hardware_that_is_none(name, message):
    with pytest.raises(UserError, match=message):
        hardware_named(name)


@pytest.mark.parametrize(
    ("name", "chips", "sides"),
    [
        ("v5p-128", 64, (4, 4, 4)),
        ("v5p-512", 256, (4, 8, 8)),
        ("v5e-256", 256, (16, 16)),
        ("v6e:4x8", 32, (4, 8)),
        ("v4-16", 8, (2, 2, 2)),
        ("v5e-256x2", 512, (16, 16)),
    ],
)
def test_names_of_slices(name, chips, sides):
    hardware = hardware_named(name)
    assert (hardware.chips, hardware.sides) == (chips, sides)


def test_what_cannot_be_cut_is_told_with_axes_and_sizes():
    cpu = hardware_named("cpu-8")
    with pytest.raises(UserError, match=r"batch of 12 rows does not divide over the mesh's .*fsdp 8.* \(= 8\)"):
        compile_stage(planned(Full(), batch_size=12), cpu, MeshShape())
    with pytest.raises(UserError, match="in 4 parts of 2"):
        compile_stage(planned(Full(), accumulate=4), cpu, MeshShape())
    with pytest.raises(UserError, match="does not cover 8 devices"):
        compile_stage(planned(Full()), cpu, MeshShape(fsdp=3))
    with pytest.raises(UserError, match="context 3"):
        compile_stage(planned(Full(), batch_size=1), hardware_named("cpu-3"), MeshShape(context=3))
    with pytest.raises(UserError, match="force_host_platform_device_count=64"):
        compile_stage(planned(Full(), batch_size=64), hardware_named("cpu-64"))


@pytest.mark.parametrize(
    ("name", "package"), [("v5e-4", "libtpu"), ("h100-8", "jax_cuda12_plugin")], ids=["tpu", "gpu"]
)
def test_a_compiler_that_is_missing_is_named(name, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        hardware_named(name).devices()


def test_a_compiler_of_another_version_is_told(monkeypatch):
    def unreadable(compiled):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", unreadable)
    with pytest.raises(UserError, match=r"'cpu-1': jax .* cannot read .*RET_CHECK.*pip install 'jax\[tpu\]=="):
        program_text(jax.jit(lambda x: x).lower(1.0).compile(), hardware_named("cpu-1"))


def test_a_search_ranks_what_fits_first(monkeypatch):
    from cpt_jax.plan import hardware as module

    # Eight A100 in one machine, which CPU devices stand for.
    monkeypatch.setattr(module, "gpus", lambda kind, count: tuple(jax.devices()[:count]))
    ranked = candidates(planned(Full()), hardware_named("a100-8"))
    # Two heads of keys cannot be cut in four; rows of 128 tokens are not cut.
    assert {(each.shape.tensor, each.shape.context) for each in ranked} == {(1, 1), (2, 1)}
    assert [each.fits for each in ranked] == sorted((each.fits for each in ranked), reverse=True)
    speeds = [each.tokens_per_second for each in ranked if each.fits]
    assert speeds == sorted(speeds, reverse=True)
    given = candidates(planned(Full()), hardware_named("a100-8"), MeshShape(tensor=2), batch_size=8, remat_given=True)
    assert {(each.planned.stage.batch_size, each.planned.stage.accumulate) for each in given} == {(8, 1), (8, 2)}


def test_a_model_alone_makes_a_stage():
    config = hf_config(tiny_config(**SIZES | {"new_rows": 0}))
    hardware = hardware_named("cpu-8")
    stage = stage_of_model(config, Wanted(method="lora", sequence=64), hardware, MeshShape(tensor=2)).stage
    assert (stage.batch_size, stage.sequence_length) == (4, 64)
    with pytest.raises(UserError, match="--new-tokens"):
        stage_of_model(config, Wanted(method="new-rows"), hardware, MeshShape())
    for name in ("sequence", "batch", "accumulate", "tokens", "new_tokens"):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is 0: give at least 1"):
            Wanted(**{name: 0})


def test_the_command(tmp_path):
    """In a process of its own, which begins with as many devices as it plans for."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(hf_config(tiny_config(**SIZES | {"new_rows": 0}))))
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", ""),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [
        sys.executable,
        "-m",
        "cpt_jax",
        "plan",
        "--model",
        str(config),
        "--hardware",
        "cpu-4",
        "--sequence",
        "64",
    ]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "plan.json")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "all-gather" in done.stdout
    # Programs for absent hardware cannot be read back.
    assert not [*tmp_path.glob("compiled/*")]
    # Of a small model too.
    assert re.search(r"a step: [\d.e-]*[1-9][\d.e-]* TFLOP", done.stdout)
    assert json.loads((tmp_path / "plan.json").read_text())["mesh"]["fsdp"] == 4
    done = subprocess.run(
        [*command, "--mesh", "fsdp=4", "--batch", "3"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.splitlines()[-1][:7]) == (2, "error: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hardware", "compiler", "attention"),
    [
        ("v5e-4", "libtpu", "splash"),
        ("v4-16", "libtpu", "splash"),
        ("v6e-8", "libtpu", "splash"),
        ("h100-8", "jax_cuda12_plugin", "blocks"),
        # It leaves its products to cuBLAS.
        ("t4-8", "jax_cuda12_plugin", "blocks"),
    ],
)
def test_a_compiler_of_absent_hardware_takes_a_step(hardware, compiler, attention, tmp_path):
    """Of a small model, with all that differs there: kernels, the loop over layers, the devices' topology."""
    pytest.importorskip(compiler)
    sizes = SIZES | {"new_rows": 0, "num_heads": 2, "num_kv_heads": 2, "head_dim": 128, "hidden_size": 256}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(hf_config(tiny_config(**sizes))))
    command = [sys.executable, "-m", "cpt_jax", "plan", "--model", str(config), "--hardware", hardware]
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    out = tmp_path / "plan.json"
    # Long rows for blocks: of 1,024 tokens three in four pairs of blocks are computed, of which half is the model's.
    length = "4096" if attention == "blocks" else "1024"
    done = subprocess.run(
        [*command, "--sequence", length, "--json", str(out)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads(out.read_text())
    assert plan["fits"]
    assert plan["attention"] == attention
    assert plan["compiled_flops_per_chip"] == pytest.approx(plan["flops_per_step"] / plan["chips"], rel=0.35)
    assert {axis for each in plan["collectives"] for axis in each["axes"]} == {"fsdp"}


def test_estimates_go_by_the_peak_of_the_type_computed_in(monkeypatch):
    monkeypatch.setattr(Hardware, "bandwidth", lambda *_: 1e12)
    hardware = dataclasses.replace(hardware_named("cpu-8"), kind="Tesla T4")
    of = {
        compute: dataclasses.replace(planned(LORA), precision=Precision(compute=compute))
        for compute in ("bfloat16", "float16")
    }
    for compute, peak in (("bfloat16", 8.1e12), ("float16", 65e12)):
        line = plan_stage(of[compute], hardware, MeshShape()).roofline
        assert line is not None
        assert line.peak == peak
    slow, fast = (candidate_of(of[compute], hardware, MeshShape(replica=8, fsdp=1)) for compute in of)
    assert slow.seconds - fast.seconds == pytest.approx(slow.paper.flops * (1 / 8.1e12 - 1 / 65e12))
