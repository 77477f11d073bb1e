"""Progress of long work: a bar with the time left on a terminal, plain lines elsewhere."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

# A plain line at most this often.
LINE_SECONDS = 10.0
# A plan's first guess weighs as much as parts that took so long: the first ones mostly compile.
GUESS_SECONDS = 10.0


def clock(seconds: float) -> str:
    """ "2 min 05 s"."""
    seconds = round(max(0.0, seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def number_of(count: int, thing: str) -> str:
    """ "1 document", "2,345 documents"."""
    return f"{count:,} {thing}{'s' * (count != 1)}"


def _figure(value: float) -> str:
    """ "2.345", "12,345"."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


_shown = True


def hide_progress() -> None:
    """From here on nothing is shown: another process of the run does that."""
    global _shown
    _shown = False


def say(text: str) -> None:
    """A line on stderr."""
    if _shown:
        print(text, file=sys.stderr, flush=True)


class Plan:
    """What a run consists of, with an estimate of each part's work, so that the time left of the whole is known from
    the start.

    Work is in any unit that is proportional to time; a first guess of its rate is corrected by what the parts really
    took.
    """

    def __init__(self, work: dict[str, float], seconds_per_unit: float) -> None:
        self._work, self._guess = dict(work), seconds_per_unit
        self._started: dict[str, float] = {}
        self._done: dict[str, float] = {}

    def begin(self, name: str) -> None:
        self._started[name] = time.monotonic()

    def end(self, name: str) -> None:
        if name in self._started and name in self._work:
            self._done[name] = time.monotonic() - self._started.pop(name)

    def skip(self, name: str) -> None:
        self._work.pop(name, None)
        self._started.pop(name, None)

    def seconds_left(self, current: str = "", current_left: float | None = None) -> float:
        """Seconds for what has not been done; `current_left` is a better estimate for the part that is running."""
        known_work = sum(self._work[name] for name in self._done)
        rate = (sum(self._done.values()) + GUESS_SECONDS) / (known_work + GUESS_SECONDS / self._guess)
        rest = sum(work * rate for name, work in self._work.items() if name not in self._done and name != current)
        if current in self._work:
            rest += self._work[current] * rate if current_left is None else current_left
        return rest


class Progress:
    """One part's progress; made by `progress`."""

    def __init__(self, name: str, total: int, unit: str, plan: Plan | None, first: int) -> None:
        self._name, self._total, self._unit, self._plan = name, total, unit, plan
        self._first = self._count = first
        self._start = time.monotonic()
        # The first unit compiles: the rate counts from the end of it.
        self._rate_start: tuple[float, int] | None = None
        self._last_line = 0.0
        self._bar = None
        self._task = None
        # A notebook's shell says that it is a terminal, and can be told to be a dumb one.
        if _shown and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress
            from rich.table import Column

            named = TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=len(name)))
            columns = (named, BarColumn(bar_width=24), TextColumn("{task.fields[state]}"))
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(name, total=total, completed=first, state="")
            self._bar.start()

    def advance(self, count: int = 1, **figures: float) -> None:
        """Counts `count` more units and shows the newest figures."""
        now = time.monotonic()
        self._count += count
        if self._rate_start is None:
            self._rate_start = (now, self._count)
        state = self._state(now, figures)
        if self._bar is not None:
            assert self._task is not None
            self._bar.update(self._task, completed=self._count, state=state)
        elif now - self._last_line >= LINE_SECONDS or self._count >= self._total:
            self._last_line = now
            say(f"{self._name}: {state}")

    def _state(self, now: float, figures: dict[str, float]) -> str:
        parts = [f"{self._count}/{self._total} {self._unit}"]
        assert self._rate_start is not None
        since, counted = now - self._rate_start[0], self._count - self._rate_start[1]
        left = None
        if counted > 0:
            left = since / counted * (self._total - self._count)
            parts.append(f"{clock(left)} left")
        if self._plan is not None:
            parts.append(f"whole run {clock(self._plan.seconds_left(self._name, left))} left")
        # Last, for a narrow terminal cuts the line.
        parts += [
            f"{name.replace('_per_second', '/s').replace('_', ' ')} {_figure(value)}" for name, value in figures.items()
        ]
        return ", ".join(parts)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress(name: str, total: int, unit: str, plan: Plan | None = None, first: int = 0) -> Iterator[Progress]:
    """Shows the progress of `total` units, of which `first` were done before."""
    shown = Progress(name, total, unit, plan, first)
    try:
        yield shown
    finally:
        shown.close()


def quiet_libraries() -> None:
    """Keeps other libraries' routine messages out of the progress display."""
    for name in ("absl", "orbax", "jax", "grain", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
