"""Kills runs, and compares what is left with a run that was left alone.

    python -m benchmarks.survival kills                      # 25 SIGKILLs at random instants, some inside a checkpoint's write, with and without packing and mixing
    python -m benchmarks.survival meshes                     # 10 changes of devices, mesh and processes, each by SIGTERM
    python -m benchmarks.survival stations quickstart runs/quickstart runs/killed    # SIGKILL once in every station of a real run

`kills` and `meshes` train a small model on the CPU (`benchmarks.survivor`) and write benchmarks/results/survival-KIND.json; tests/training/test_survival.py
does the same for less long. The seed is printed, and can be given.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cpt_jax.core.journal import JOURNAL, read_journal
from cpt_jax.core.storage import write_json_atomic

RESULTS = Path(__file__).parent / "results"
TRY_AGAIN = 75


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
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={place.devices}",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
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
        return sum(event["event"] == "training" for event in read_journal(self.directory / JOURNAL))

    def steps(self) -> int:
        path = self.directory / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def stepped(self, sessions: int) -> bool:
        """Whether the session after so many has done a step."""
        begun = [event["first"] for event in read_journal(self.directory / JOURNAL) if event["event"] == "training"]
        return len(begun) > sessions and self.steps() >= begun[-1]

    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.directory / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def losses(self) -> list[float]:
        return [json.loads(line)["loss"] for line in (self.directory / "metrics.jsonl").read_text().splitlines()]

    def weights(self) -> str:
        return (self.directory / "weights.sha256").read_text()

    def ledger(self) -> list[list]:
        """The rows of each step, in order; of a step that was computed again, those of the last time."""
        steps: dict[int, dict[int, list]] = {}
        for path in sorted(self.directory.glob("ledger-*.jsonl"), key=lambda path: path.stat().st_mtime):
            for line in path.read_text().splitlines():
                # A line may have been cut off.
                if line.endswith("}"):
                    entry = json.loads(line)
                    for index, row in enumerate(entry["rows"]):
                        steps.setdefault(entry["step"], {}).setdefault(entry["first_row"] + index, []).append(row)
        for step, rows in steps.items():
            same = all(row == found[0] for found in rows.values() for row in found)
            assert same, f"step {step} was given other documents when it was computed again"
        return [[rows[row][0] for row in sorted(rows)] for _, rows in sorted(steps.items())]


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


def kills(arguments: argparse.Namespace, root: Path) -> bool:
    results, good = {}, True
    for name, options in {
        "two domains, packed": ["--domains", 2],
        "one domain, not packed": ["--domains", 1, "--packing", "none"],
    }.items():
        place = root / name.replace(" ", "-").replace(",", "")
        place.mkdir()
        options = [*options, "--steps", arguments.steps]
        whole, killed = Fire(place / "whole", options), Fire(place / "killed", options)
        whole.run(Place())
        started = time.monotonic()
        met = kill_often(killed, arguments.kills, random.Random(arguments.seed), arguments.seconds)
        killed.run(Place())
        same = {
            "losses": whole.losses() == killed.losses(),
            "weights": whole.weights() == killed.weights(),
            "documents": whole.ledger() == killed.ledger(),
        }
        good &= all(same.values())
        minutes = (time.monotonic() - started) / 60
        results[name] = {"kills": met, "steps": arguments.steps, "the same, bit for bit": same, "minutes": minutes}
        print(f"{name}: killed {arguments.kills} times {met} in {arguments.steps} steps; the same: {same}", flush=True)
    write_json_atomic(RESULTS / "survival-kills.json", {"seed": arguments.seed, **results})
    return good


def meshes(arguments: argparse.Namespace, root: Path) -> bool:
    options = ["--steps", arguments.steps]
    whole, moved = Fire(root / "whole", options), Fire(root / "moved", options)
    whole.run(Place())
    each = arguments.steps // len(PLACES)
    visited = move_often(moved, PLACES, each, random.Random(arguments.seed))
    documents, difference = whole.ledger() == moved.ledger(), largest_difference(moved.losses(), whole.losses())
    for line in visited:
        print(line)
    print(f"the same documents in the same order: {documents}; losses differ by at most {difference:.2g}")
    found = {"places": visited, "documents": documents, "largest difference of a loss, relative": difference}
    write_json_atomic(RESULTS / "survival-meshes.json", {"seed": arguments.seed, **found})
    return documents and difference < 1e-5


def begun(workdir: Path) -> set[str]:
    """Stations that were begun and are not done."""
    marks = {path.stem: path for path in (workdir / ".stations").glob("*.json")}
    return {name for name, path in marks.items() if not json.loads(path.read_text())["done"]}


def run_until_killed(recipe: str, workdir: Path, spared: set[str], seconds: float) -> str | None:
    """Starts the run, and kills it some seconds into the first station that was not killed before; None: it ended."""
    process = subprocess.Popen([sys.executable, "-m", "cpt_jax", "run", recipe, "--workdir", str(workdir)])
    entered: dict[str, float] = {}
    while process.poll() is None:
        time.sleep(0.05)
        for station in begun(workdir) - spared:
            since = entered.setdefault(station, time.monotonic())
            # A short station ends within a second; a stage is to have trained, and saved, something.
            if time.monotonic() - since > (seconds if station.startswith("stage-") else 0.3):
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                return station
    if process.returncode:
        sys.exit(f"the run failed with {process.returncode}")
    return None


def stations(arguments: argparse.Namespace) -> bool:
    killed: set[str] = set()
    while (station := run_until_killed(arguments.recipe, arguments.workdir, killed, arguments.seconds)) is not None:
        print(f"killed in {station}", flush=True)
        killed.add(station)
    same = (arguments.whole / "eval.json").read_bytes() == (arguments.workdir / "eval.json").read_bytes()
    print(f"killed {len(killed)} times ({', '.join(sorted(killed))}); eval.json {'identical' if same else 'DIFFERS'}")
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, steps in (("kills", 1500), ("meshes", 330)):
        sub = kinds.add_parser(kind)
        sub.add_argument("--seed", type=int, default=random.randrange(10**6))
        sub.add_argument("--steps", type=int, default=steps)
        if kind == "kills":
            sub.add_argument("--kills", type=int, default=25)
            sub.add_argument("--seconds", type=float, default=1.5, help="of training that a kill waits at most")
    sub = kinds.add_parser("stations")
    sub.add_argument("recipe")
    sub.add_argument("whole", type=Path, help="directory of the run that was left alone")
    sub.add_argument("workdir", type=Path)
    sub.add_argument("--seconds", type=float, default=60.0, help="how long a stage of training may run")
    arguments = parser.parse_args()
    if arguments.kind == "stations":
        sys.exit(0 if stations(arguments) else 1)
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        good = {"kills": kills, "meshes": meshes}[arguments.kind](arguments, Path(directory))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
