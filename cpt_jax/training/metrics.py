"""metrics.jsonl: one object a step."""

import json
from pathlib import Path
from typing import IO

from cpt_jax.core.storage import disk_full_is_told, write_text_atomic


class MetricsFile:
    """Lines of a stage's metrics; those after `done` steps (written by an interrupted run, to be computed again) are
    dropped first."""

    def __init__(self, path: Path, done: int) -> None:
        self._path = path
        kept = []
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                # The last line may be cut.
                if line.endswith("}\n") and json.loads(line)["step"] <= done:
                    kept.append(line)
        write_text_atomic(path, "".join(kept))
        self._file: IO[str] = path.open("a")

    def write(self, metrics: dict[str, float]) -> None:
        with disk_full_is_told(self._path):
            self._file.write(json.dumps(metrics) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()
