"""metrics.jsonl: one object a step."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import jax

from cpt_jax.core.storage import disk_full_is_told, json_line, numbers, read_objects, write_text_atomic

METRICS = "metrics.jsonl"


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """A stage's lines in order; what is null there is NaN again."""
    return [numbers(line) for line in read_objects(directory / METRICS)]


class MetricsFile:
    """Lines of a stage's metrics, null for a loss that is no number; those after `done` steps (written by an interrupted
    run, to be computed again) are `dropped` first. Of several processes, the first one writes them."""

    def __init__(self, path: Path, done: int) -> None:
        self._path, self._file = path, None
        kept: list[str] = []
        self.dropped: list[dict[str, float]] = []
        # Learnt in all steps that are kept or written.
        self.tokens = 0
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                # The last line may be cut.
                if not line.endswith("}\n"):
                    continue
                if (values := json.loads(line))["step"] <= done:
                    kept.append(line)
                    self.tokens += int(values["tokens"])
                else:
                    self.dropped.append(values)
        if jax.process_index() == 0:
            write_text_atomic(path, "".join(kept))
            self._file: IO[str] | None = path.open("a")

    def write(self, metrics: dict[str, float]) -> None:
        self.tokens += int(metrics["tokens"])
        if self._file is None:
            return
        with disk_full_is_told(self._path):
            self._file.write(json_line(metrics))
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class StepClock:
    """Where a step's wall time goes: what the host waits for data, for checkpoints, for the forgetting watch and (in the
    first step) for the compiler, and the rest, which is the devices'."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._parts = {"data": 0.0, "checkpoint": 0.0, "compile": 0.0, "watch": 0.0}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._parts[part] += time.monotonic() - started

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap, in all and by part."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        parts, self._parts = self._parts, dict.fromkeys(self._parts, 0.0)
        compute = seconds - sum(parts.values())
        return {"seconds": seconds, **{f"{name}_seconds": value for name, value in parts.items()}} | {
            "compute_seconds": compute
        }


def metrics_line(
    step: int,
    metrics: dict[str, Any],
    names: tuple[str, ...],
    lap: dict[str, float],
    flops: float,
    peak: float | None,
    unreadable: Mapping[str, int],
    epochs: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """A step's line: losses (nats a token, also by domain), tokens that were learnt, rates and times.

    Args:
      metrics: what the step returned, on the host.
      lap: a StepClock's.
      flops: model FLOPs a token (`training.flops`).
      peak: of all devices, FLOP/s; where it is not known there is no "mfu".
      unreadable: documents left out up to now, by domain; "unreadable/DOMAIN" where there are some.
      epochs: how often each domain was read, up to what is packed: "epochs/DOMAIN".

    "read/DOMAIN" counts its tokens in the step's rows, "tokens" those of all domains that are learnt (of conversations,
    the answers).
    """
    by_domain = {
        f"{kind}/{name}": float(value / count)
        for kind in ("nats", "divergence")
        for name, value, count in zip(names, metrics.get(kind, ()), metrics["tokens"], strict=False)
        if count > 0
    }
    read = {f"read/{name}": int(count) for name, count in zip(names, metrics["positions"], strict=False)}
    rate = sum(read.values()) / lap["seconds"]
    return {
        "step": step,
        "loss": float(metrics["loss"]),
        **by_domain,
        "learning_rate": float(metrics["learning_rate"]),
        "gradient_norm": float(metrics["gradient_norm"]),
        "skipped": int(metrics["skipped"]),
        "skipped_in_a_row": int(metrics["skipped_in_a_row"]),
        "tokens": int(metrics["tokens"].sum()),
        **read,
        **{f"tokens/{name}": int(count) for name, count in zip(names, metrics["tokens"], strict=True)},
        "tokens_per_second": rate,
        "model_flops_per_second": rate * flops,
        **{f"epochs/{name}": round(count, 4) for name, count in (epochs or {}).items()},
        **{f"unreadable/{name}": count for name, count in unreadable.items()},
        **({} if peak is None else {"mfu": rate * flops / peak}),
        **lap,
    }
