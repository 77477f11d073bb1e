"""A run of `benchmarks.survivor`, started, killed and moved from place to place."""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cpt_jax.checkpoint import intact
from cpt_jax.core.errors import TRY_AGAIN
from cpt_jax.core.journal import JOURNAL
from cpt_jax.core.storage import read_objects


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a session runs: processes of so many devices each, and a mesh over all of them."""

    processes: int = 1
    devices: int = 1
    mesh: str = "fsdp=1"

    def __str__(self) -> str:
        return f"{self.processes} x {self.devices} devices, {self.mesh}"


PLACES = (
    Place(1, 8, "fsdp=8"),
    Place(1, 4, "fsdp=4"),
    Place(1, 2, "tensor=2"),
    Place(1, 1, "fsdp=1"),
    Place(2, 4, "fsdp=4,tensor=2"),
    Place(1, 8, "replica=2,fsdp=4"),
    Place(4, 1, "fsdp=4"),
    Place(1, 8, "fsdp=2,tensor=4"),
    Place(2, 1, "replica=2"),
    Place(1, 2, "fsdp=2"),
    Place(1, 8, "replica=2,fsdp=2,tensor=2"),
)


class Fire:
    """A run of `benchmarks.survivor` in a directory, started as often as it takes."""

    def __init__(self, directory: Path, options: Sequence[object]) -> None:
        self.directory, self._options = directory, [str(option) for option in options]

    def start(self, place: Place) -> list[subprocess.Popen]:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={place.devices}",
            # As `cpt` has it: programs are kept for the next session, and may be cut off while they are written.
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(self.directory.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
        }
        command = [sys.executable, "-m", "benchmarks.survivor", self.directory, "--mesh", place.mesh, *self._options]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        commands = [
            [*map(str, command), "--processes", str(place.processes), "--process", str(index), "--port", str(port)]
            for index in range(place.processes)
        ]
        with (self.directory.parent / f"{self.directory.name}.log").open("a") as log:
            return [subprocess.Popen(one, env=environment, stderr=log, stdout=log) for one in commands]

    def run(self, place: Place) -> None:
        """To its end."""
        codes = [process.wait() for process in self.start(place)]
        assert not any(codes), f"{place}: exit {codes}"

    def sessions(self) -> int:
        """How often training has begun."""
        return len(self.begun())

    def steps(self) -> int:
        path = self.directory / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def begun(self) -> list[int]:
        """The first step of each session."""
        return [event["first"] for event in read_objects(self.directory / JOURNAL) if event["event"] == "training"]

    def stepped(self, sessions: int) -> bool:
        """Whether the session after so many has done a step."""
        return self.sessions() > sessions and self.steps() >= self.begun()[-1]

    def saved(self, sessions: int) -> bool:
        """Whether it has saved one."""
        return (
            self.stepped(sessions) and next(iter(intact.steps(self.directory / "checkpoints")), 0) >= self.begun()[-1]
        )

    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.directory / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def losses(self) -> list[float]:
        return [json.loads(line)["loss"] for line in (self.directory / "metrics.jsonl").read_text().splitlines()]

    def weights(self) -> str:
        return (self.directory / "weights.sha256").read_text()

    def ledger(self) -> list[list]:
        """The rows of each step, in order: the same in all processes, and each time that it was computed."""
        steps: dict[int, list] = {}
        for path in self.directory.glob("ledger-*.jsonl"):
            for line in path.read_text().splitlines():
                # A line may have been cut off.
                if line.endswith("}"):
                    entry = json.loads(line)
                    rows = steps.setdefault(entry["step"], entry["rows"])
                    assert rows == entry["rows"], f"step {entry['step']} was given other documents in {path.name}"
        return [rows for _, rows in sorted(steps.items())]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120.0) -> bool:
    """Whether it came true before the process ended."""
    until = time.monotonic() + seconds
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < until, f"waited {seconds} s in vain"
        time.sleep(0.002)
    return False


def kill_often(fire: Fire, kills: int, generator: random.Random, seconds: float) -> dict[str, int]:
    """SIGKILLs at random instants: from its start on, in the first `seconds` behind its first step, and inside the write
    of a checkpoint. Returns how often each was met; what was meant for a write is only counted as one if it was."""
    met = {"before a step": 0, "training": 0, "writing a checkpoint": 0}
    for _ in range(kills):
        before, aim = fire.sessions(), generator.choice(("anywhere", "write", "write", "training"))
        [process] = fire.start(Place())
        if aim == "anywhere":
            time.sleep(generator.uniform(0, 6))
        elif wait_until(lambda before=before: fire.stepped(before), process):
            if aim == "write":
                # The first is let through, so that the next session has something new to go on from.
                wait_until(lambda before=before: fire.saved(before), process)
            time.sleep(generator.uniform(0, seconds))
            if aim == "write":
                wait_until(fire.writing, process)
                time.sleep(generator.uniform(0, 0.02))
        assert process.poll() is None, "the run ended before it was killed: give it more steps"
        process.kill()
        process.wait()
        place = "training" if fire.stepped(before) else "before a step"
        met["writing a checkpoint" if place == "training" and fire.writing() else place] += 1
    return met


def move_often(fire: Fire, places: Sequence[Place], steps: int, generator: random.Random) -> list[str]:
    """Goes on from place to place after some `steps`, each time by SIGTERM to one of the processes; the last one to the
    end. Returns where it was up to which step."""
    visited = []
    for place in places[:-1]:
        aim, processes = fire.steps() + generator.randint(steps // 2, steps), fire.start(place)
        assert wait_until(lambda aim=aim: fire.steps() >= aim, processes[0]), f"{place}: it ended by itself"
        generator.choice(processes).send_signal(signal.SIGTERM)
        codes = [process.wait() for process in processes]
        assert set(codes) == {TRY_AGAIN}, f"{place}: exit {codes}"
        visited.append(f"{place}: to step {fire.steps()}")
    fire.run(places[-1])
    return [*visited, f"{places[-1]}: to the end"]


def largest_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))
