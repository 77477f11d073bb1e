"""Goodput: how much of a run's wall time trained, and where the rest went."""

import html
from pathlib import Path
from typing import Any

from cpt_jax.core.journal import JOURNAL
from cpt_jax.core.progress import clock
from cpt_jax.core.storage import read_objects

# Causes in the order they are shown in, with their colours.
CAUSES = {
    "training": "#1f6f8b",
    "start": "#b08900",
    "compilation": "#7d5ba6",
    "data": "#6a7f3c",
    "checkpoints": "#4a5568",
    "evaluation": "#6fb7cf",
    "vocabulary, preparation, export": "#c9ced6",
    "steps computed again": "#c8553d",
    "not running, or cut off": "#e2e5ea",
}


def goodput(run: Path) -> dict[str, float]:
    """Seconds of wall time by cause, from the run's first start to its last event; {} where nothing was recorded.

    start: from the process's start, and from a stage's, to the first step. compilation: of first steps. data,
    checkpoints: the loop waits for them. steps computed again: after a restart, those behind the checkpoint. What was
    under way when a process was killed, and the time until the next start, is "not running, or cut off".
    """
    events = read_objects(run / JOURNAL)
    # Starts that found all done, as one that exports, are not the run's.
    while len(events) > 1 and events[-1]["event"] == "run":
        events.pop()
    if not events or events[0]["event"] != "run":
        return {}
    seconds = dict.fromkeys(CAUSES, 0.0)
    begun: dict[str, float] = {}
    for event in events:
        _count(event, begun, seconds)
    for path in (run / "stages").glob("*/metrics.jsonl"):
        for line in read_objects(path):
            _count_step(line, seconds)
    whole = events[-1]["at"] - events[0]["started"]
    seconds["not running, or cut off"] = max(0.0, whole - sum(seconds.values()))
    return seconds


def _count(event: dict[str, Any], begun: dict[str, float], seconds: dict[str, float]) -> None:
    station = event.get("station", "")
    match event["event"]:
        case "run":
            begun.clear()
            begun["run"] = event["at"]
            seconds["start"] += event["at"] - event["started"]
        case "begin":
            begun[station] = event["at"]
            seconds["start"] += event["at"] - begun.pop("run", event["at"])
        case "training":
            seconds["start"] += event["at"] - begun.get(station, event["at"])
            seconds["compilation"] += event["compile_seconds"]
            seconds["steps computed again"] += event["lost_seconds"]
        case "trained" | "preempted":
            seconds["checkpoints"] += event["checkpoint_seconds"]
            # Runs that are trained together go on in another group when the first of them has ended.
            begun[station] = event["at"]
        case "done" if not station.startswith("stage-"):
            cause = "evaluation" if station.startswith("evaluate-") else "vocabulary, preparation, export"
            seconds[cause] += event["at"] - begun.get(station, event["at"])


def _count_step(line: dict[str, float], seconds: dict[str, float]) -> None:
    parts = {"training": "compute", "compilation": "compile", "data": "data", "checkpoints": "checkpoint"}
    for cause, part in parts.items():
        seconds[cause] += line[f"{part}_seconds"]
    seconds["evaluation"] += line.get("watch_seconds", 0.0)


def goodput_section(run: Path) -> str:
    """A bar and its legend, for the report; "" where nothing was recorded."""
    seconds = goodput(run)
    whole = sum(seconds.values())
    if not whole:
        return ""
    shown = {cause: value for cause, value in seconds.items() if value >= 0.001 * whole}
    bar = "".join(
        f'<span title="{html.escape(cause)}" style="background:{CAUSES[cause]};width:{100 * value / whole:.2f}%"></span>'
        for cause, value in shown.items()
    )
    legend = "".join(
        f'<tr><td><i style="background:{CAUSES[cause]}"></i> {html.escape(cause)}</td><td>{clock(value)}</td><td>{value / whole:.1%}</td></tr>'
        for cause, value in shown.items()
    )
    return (
        f"<h2>Goodput: {seconds['training'] / whole:.0%} of {clock(whole)} trained</h2>"
        f'<div class="goodput">{bar}</div><div class="wide"><table class="causes"><tbody>{legend}</tbody></table></div>'
        "<p class=note>Wall time from the run's first start to its end, over all restarts.</p>"
    )


GOODPUT_STYLE = """
.goodput { display: flex; height: 1.6rem; border-radius: 5px; overflow: hidden; margin: .8rem 0; }
.goodput span { display: block; } .causes i { display: inline-block; width: .8rem; height: .8rem; border-radius: 3px; }
"""
