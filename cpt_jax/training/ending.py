"""A stage that ended before its last step: where, and why."""

import json
from pathlib import Path

from cpt_jax.core import processes
from cpt_jax.core.storage import write_json_atomic

ENDED = "ended.json"


def ended_early(directory: Path) -> tuple[int, str] | None:
    """(the step, the reason), if a stage did."""
    path = directory / ENDED
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return found["step"], found["why"]


def end_early(directory: Path, step: int, why: str) -> None:
    """To be said before the last checkpoint is written: a stage that is killed in between goes on to the same end."""
    if processes.is_first():
        write_json_atomic(directory / ENDED, {"step": step, "why": why})


def ended_at(directory: Path, step: int) -> bool:
    """Whether it ended at the step that its newest checkpoint is of; what is said of a later one is taken back."""
    if processes.is_first():
        found = ended_early(directory)
        if found is not None and found[0] != step:
            (directory / ENDED).unlink()
        there = found is not None and found[0] == step
    else:
        there = False
    return processes.told(there)
