"""Several runs of a sweep at a time, each in a process of its own."""

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, NamedTuple

from cpt_jax.core.errors import TRY_AGAIN, UserError
from cpt_jax.core.progress import number_of, say
from cpt_jax.recipe.recipe import Recipe
from cpt_jax.sweep.directory import SweepDirectory
from cpt_jax.sweep.sweep import Manner, Pace, command_of

# What a process takes beside its arrays: JAX, the tokenizer, what it compiles.
OVERHEAD = 1_500_000_000
# Of the memory that is free, for what is counted on paper.
USABLE = 0.8
# A process that asks to be tried again (75) is, so many times.
TRIES = 3


class GPU(NamedTuple):
    """A GPU, or a part of one (MIG): what CUDA_VISIBLE_DEVICES calls it, and its free bytes (None: not told)."""

    name: str
    free: int | None


@dataclasses.dataclass
class _Child:
    name: str
    slot: int
    process: subprocess.Popen
    log: IO[bytes]
    # Where its own words begin in the log.
    log_start: int
    started: float
    tries: int


def run_at_once(directory: SweepDirectory, left: dict[str, Recipe], manner: Manner) -> None:
    """Keeps so many processes at work until all runs are at their end."""
    from cpt_jax.training.guard import ends_when_asked

    gpus = visible_gpus()
    count = manner.at_once if isinstance(manner.at_once, int) else by_memory(directory, left, gpus)
    count = min(count, len(left))
    say(f"sweep: {number_of(len(left), 'run')}, {count} at a time; what they say is in {directory.path / 'logs'}")
    waiting, children, pace = [(name, 1) for name in left], [], Pace(list(left.values()))
    try:
        with ends_when_asked():
            while waiting or children:
                while waiting and len(children) < count:
                    name, tries = waiting.pop(0)
                    slot = min(set(range(count)) - {child.slot for child in children})
                    children.append(_start(directory, name, slot, tries, manner, _environment(slot, count, gpus)))
                time.sleep(0.2)
                for child in [child for child in children if child.process.poll() is not None]:
                    children.remove(child)
                    if child.process.returncode == TRY_AGAIN and child.tries < TRIES:
                        waiting.append((child.name, child.tries + 1))
                        continue
                    _ended(directory, child, manner)
                    pace.ended(left[child.name], failed=child.name in directory.failed())
                    if waiting or children:
                        say(
                            f"sweep: {len(waiting) + len(children)} of {len(directory.recipes)} runs to go{pace.left()}"
                        )
    finally:
        # Each saves where it is.
        for child in children:
            child.process.terminate()
        for child in children:
            child.process.wait()
            child.log.close()


def _start(
    directory: SweepDirectory, name: str, slot: int, tries: int, manner: Manner, environment: Mapping[str, str]
) -> _Child:
    directory.log(name).parent.mkdir(parents=True, exist_ok=True)
    log = directory.log(name).open("ab")
    log_start = log.tell()
    directory.begun_now(name)
    command, recipe, arguments = command_of(directory, name, manner)
    words = [sys.executable, "-m", "cpt_jax", command, recipe, "--workdir", directory.run_location(name)]
    words += ["--shared", str(directory.shared.directory), *arguments]
    # A group of its own: Ctrl-C is for the sweep, which passes it on. The lock too: where the sweep is killed, its
    # processes go on, and another sweep is to wait for them.
    process = subprocess.Popen(
        words, stdout=log, stderr=log, env=dict(environment), start_new_session=True, pass_fds=directory.locks
    )
    say(f"sweep: run {name} begins")
    return _Child(name, slot, process, log, log_start, time.monotonic(), tries)


def _ended(directory: SweepDirectory, child: _Child, manner: Manner) -> None:
    child.log.close()
    if child.process.returncode == 0:
        directory.done_now(child.name, time.monotonic() - child.started, manner.exports)
        return
    lines = directory.log(child.name).read_bytes()[child.log_start :].decode(errors="replace").splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    ended = f"its process ended with {child.process.returncode}: see {directory.log(child.name)}"
    directory.failed_now(child.name, told[-1] if told else ended)


def _environment(slot: int, count: int, gpus: Sequence[GPU]) -> dict[str, str]:
    """Of several GPUs each process has one; on one, they share its memory."""
    if not gpus:
        return dict(os.environ)
    on_one = -(-count // len(gpus))
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)].name,
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / on_one:.3f}",
    }


def visible_gpus() -> list[GPU]:
    """The NVIDIA GPUs, or parts of them (MIG), that this process may use."""
    if shutil.which("nvidia-smi") is None or os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    if answer.returncode:
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(index for index, _, _ in rows))
    gpus = []
    for name in map(str.strip, visible.split(",")):
        # As CUDA reads it: an index, the beginning of a UUID, or a part of a GPU, which nvidia-smi does not list here.
        free = [free for index, uuid, free in rows if name == index or (name[:4] == "GPU-" and uuid.startswith(name))]
        if free or name.startswith("MIG-"):
            gpus.append(GPU(name, int(free[0]) << 20 if free and free[0].isdecimal() else None))
    return gpus


def by_memory(directory: SweepDirectory, left: dict[str, Recipe], gpus: Sequence[GPU]) -> int:
    """How many processes there are memory and cores for, on paper.

    Raises:
      UserError: a GPU's free memory is not told.
    """
    import jax

    from cpt_jax.training.memory import host_memory

    memory = [gpu.free for gpu in gpus if gpu.free is not None]
    if len(memory) < len(gpus):
        untold = ", ".join(gpu.name for gpu in gpus if gpu.free is None)
        raise UserError(f"nvidia-smi does not tell the free memory of {untold}: give a number, as in --at-once 2")
    # This process trains nothing: it must not take a GPU's memory.
    jax.config.update("jax_platforms", "cpu")
    one = max(_bytes_of(directory, recipe) for recipe in left.values()) + OVERHEAD
    by_devices = sum(int(USABLE * free / one) for free in memory) if gpus else int(USABLE * host_memory() / one)
    return max(1, min(by_devices, len(os.sched_getaffinity(0))))


def _bytes_of(directory: SweepDirectory, recipe: Recipe) -> int:
    """What a run's largest stage takes, its new rows not counted."""
    from cpt_jax.checkpoint.hf import read_config
    from cpt_jax.models.decoder import abstract_decoder
    from cpt_jax.models.families import family_for
    from cpt_jax.training.memory import stage_memory

    hf_config = read_config(directory.shared.source(recipe.base))
    config, sizes = family_for(hf_config).config_from_hf(hf_config), [0]
    for stage in recipe.stages:
        layout = dataclasses.replace(stage.method.layout(config), remat=stage.remat)
        memory = stage_memory(
            abstract_decoder(layout, stage.method.lora_config()),
            stage.method.trains,
            stage.optimizer,
            ema=stage.ema,
            retention=stage.retention,
            precision=recipe.precision,
            rows=stage.batch_size // stage.accumulate,
            sequence_length=stage.sequence_length,
            scores=True,
        )
        sizes.append(memory.held + memory.temporary)
    return max(sizes)
