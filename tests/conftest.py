"""Eight fake CPU devices, no silent broadcasting of ranks, programs that are compiled quickly, and the small inputs that
tests share."""

import os

# XLA compiles quickly instead of well. The gradient of a tiny model is compiled in 2.8 s of CPU time without any of these, in
# 1.4 without the optimizations of LLVM, in 0.4 without the newer emitters of fusions besides; and in 0.22 instead of 0.34 where a
# program is not cut into up to 32 parts to be compiled in as many threads.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0"
    + " --xla_llvm_disable_expensive_passes=true"
    + " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    + " --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Threads of torch and NumPy would wait for each other, turning, on cores that two processes of tests share already.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Processes that tests start compile for themselves, but for commands (`commands.environment`).
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import gc
import tempfile
from pathlib import Path

import jax
import pytest
from inputs import english, hf_config, random_weights, tiny_config, write_tokenizer

from cpt_jax.checkpoint.hf_write import save

jax.config.update("jax_numpy_rank_promotion", "raise")

# Of programs that this process compiles again, as a run that is continued does. No other process writes there: one that is
# killed would leave half a program.
PROGRAMS = tempfile.TemporaryDirectory()
jax.config.update("jax_enable_compilation_cache", True)
jax.config.update("jax_compilation_cache_dir", PROGRAMS.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def pytest_unconfigure() -> None:
    PROGRAMS.cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, for no process to be left alone with a long one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Python looks for cycles less often, and not among all that was imported: a tenth of the CPU time of tests that trace."""
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A tiny random Llama with a tokenizer that knows some English and no Chinese, as a HF directory."""
    root = tmp_path_factory.mktemp("tiny")
    write_tokenizer(root / "tokenizer", english(300))
    config = tiny_config()
    save(root / "model", config, random_weights(config), hf_config(config), root / "tokenizer")
    return root / "model"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """The real SmolLM2-135M as a HF directory, imported from its GGUF file."""
    from cpt_jax.checkpoint.gguf import import_gguf

    gguf = Path(".cache/quickstart/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert gguf.exists(), "run `make inputs` first"
    out = tmp_path_factory.mktemp("smollm2") / "model"
    import_gguf(gguf, out)
    return out
