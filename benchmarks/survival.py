"""Kills a real run once in every station with SIGKILL, starts it again, and compares its eval.json with that of a run
that was left alone.

    python -m benchmarks.survival quickstart runs/quickstart runs/killed
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("whole", type=Path, help="directory of the run that was left alone")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long a stage of training may run")
    arguments = parser.parse_args()
    killed: set[str] = set()
    while (station := run_until_killed(arguments.recipe, arguments.workdir, killed, arguments.seconds)) is not None:
        print(f"killed in {station}", flush=True)
        killed.add(station)
    same = (arguments.whole / "eval.json").read_bytes() == (arguments.workdir / "eval.json").read_bytes()
    print(f"killed {len(killed)} times ({', '.join(sorted(killed))}); eval.json {'identical' if same else 'DIFFERS'}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
