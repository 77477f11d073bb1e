"""A run's events with their times, an object a line: what became of its wall time can be told from them."""

import os
import time
from pathlib import Path
from typing import IO, Any

from cpt_jax.core.storage import disk_full_is_told, json_line

JOURNAL = "events.jsonl"


class Journal:
    """Appends events to a file; to none without a path."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    def write(self, event: str, **fields: Any) -> None:
        if self._path is None:
            return
        line = json_line({"at": round(time.time(), 3), "event": event, **fields})
        with disk_full_is_told(self._path), self._path.open("ab+") as file:
            # A line that was cut off takes no other with it.
            file.write((line if _ends_a_line(file) else "\n" + line).encode())


def _ends_a_line(file: IO[bytes]) -> bool:
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


# Importing what a command needs takes seconds; an older process (a notebook) was not started for this run.
_OLD = 120.0


def process_started() -> float:
    """When this process began, in seconds since 1970, if that was for what it does now; otherwise now."""
    now = time.time()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return now
    return now - age if age < _OLD else now
