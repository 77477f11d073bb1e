"""Kills runs, and compares what is left with a run that was left alone.

    python -m benchmarks.survival kills                      # 25 SIGKILLs at random instants, some inside a checkpoint's write, with and without packing and mixing
    python -m benchmarks.survival meshes                     # 10 changes of devices, mesh and processes, each by SIGTERM
    python -m benchmarks.survival stations quickstart runs/quickstart runs/killed    # SIGKILL once in every station of a real run

`kills` and `meshes` train a small model on the CPU (`benchmarks.survivor`) and write benchmarks/results/survival-KIND.json; tests/training/test_survival.py
does the same for less long. The seed is printed, and can be given.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.under_fire import PLACES, Fire, Place, kill_often, largest_difference, move_often
from cpt_jax.core.storage import write_json_atomic

RESULTS = Path(__file__).parent / "results"
DATA = {"mixed-packed": ["--domains", 2], "neither": ["--domains", 1, "--packing", "none"]}


def kills(arguments: argparse.Namespace, root: Path) -> bool:
    results, good = {}, True
    for name in arguments.data:
        place = root / name
        place.mkdir()
        options = [*DATA[name], "--steps", arguments.steps, "--checkpoint-seconds", arguments.checkpoint_seconds]
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
        went_on = {first for first in killed.begun() if first > 1}
        results[name] = {"kills": met, "went on from checkpoints": len(went_on), "steps": arguments.steps}
        results[name] |= {"the same, bit for bit": same, "minutes": minutes}
        print(
            f"{name}: killed {arguments.kills} times {met} in {arguments.steps} steps, went on from {len(went_on)} checkpoints; the same: {same}",
            flush=True,
        )
    name = "survival-kills.json" if len(results) > 1 else f"survival-kills-{arguments.data[0]}.json"
    write_json_atomic(RESULTS / name, {"seed": arguments.seed, **results})
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
            sub.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
            sub.add_argument("--checkpoint-seconds", type=float, default=0.2)
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
