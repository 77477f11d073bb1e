"""What the report says of the forgetting watch, and of stages that ended early."""

import html
import json
from pathlib import Path

from cpt_jax.core.storage import numbers
from cpt_jax.report.plots import watch_plot
from cpt_jax.report.tables import html_table
from cpt_jax.training.ending import ended_early
from cpt_jax.training.watch import read_watch


def endings(directories: dict[str, Path]) -> str:
    """A sentence for each stage, by name, that ended before its last step; "" where none did."""
    found = {name: ended_early(path) for name, path in directories.items()}
    return "".join(
        f"<p><b>Stage {html.escape(name)} ended early</b>, after step {end[0]:,}: {html.escape(end[1])}.</p>"
        for name, end in found.items()
        if end is not None
    )


def watch_section(run: Path, directories: dict[str, Path], plots: Path) -> str:
    """The watch's curves over the stages, and what it did; "" where nothing was watched."""
    stages = {name: lines for name, path in directories.items() if (lines := read_watch(path))}
    if not stages:
        return ""
    files = {name: run / "evaluations" / f"watch-base-{name}.json" for name in stages}
    base = {name: numbers(json.loads(path.read_text())) for name, path in files.items() if path.exists()}
    rows = [
        [html.escape(name), f"{line['step']:,}", html.escape(line["action"])]
        for name, lines in stages.items()
        for line in lines
        if line["action"] is not None
    ]
    table = html_table(["stage", "step", "what it did"], rows) if rows else ""
    average = any("average" in line for lines in stages.values() for line in lines)
    note = (
        "A sample of held-out documents, measured while it trained; dashed grey: the base"
        + ("; dashed: the moving average" if average else "")
        + ("; red: the watch acted" if rows else "")
        + "."
    )
    return (
        f"<h2>What it forgot on the way</h2>{table}<figure>{watch_plot(stages, base, plots)}</figure>"
        f"<p class=note>{note}</p>"
    )
