"""Bits per byte by where in its document a byte is: what a longer context brings."""

import html
from collections.abc import Sequence

from cpt_jax.report.tables import html_table, stage_label


def _size(count: int) -> str:
    return next(
        f"{count >> shift}{unit}" for shift, unit in ((20, "M"), (10, "k"), (0, "")) if count >> shift or not shift
    )


def position_rows(entries: Sequence[dict]) -> list[list[str]]:
    """A domain's evaluations, a row each, by stretches of its documents; [] where these were not told apart."""
    found = [(entry, {part["start"]: part for part in entry.get("by_position", ())}) for entry in entries]
    starts = sorted({start for _, parts in found for start in parts})
    if not starts:
        return []
    any_of = {start: next(parts[start] for _, parts in found if start in parts) for start in starts}
    header = ["bytes of the document", *(f"{_size(start)} to {_size(any_of[start]['end'])}" for start in starts)]
    rows = [[stage_label(entry), *(_bits(parts[start]["bits_per_byte"]) for start in starts)] for entry, parts in found]
    return [header, *rows, ["text there", *(f"{any_of[start]['bytes']:,}" for start in starts)]]


def _bits(value: float | None) -> str:
    """A model that has diverged has none."""
    return "-" if value is None else f"{value:.4f}"


def positions_section(entries: Sequence[dict], domains: Sequence[str]) -> str:
    """A table a domain, for a run's page."""
    parts = []
    for name in domains:
        if rows := position_rows([entry for entry in entries if entry["domain"] == name]):
            header, *cells = [[html.escape(cell) for cell in row] for row in rows]
            parts.append(html_table([f"{html.escape(name)}: {header[0]}", *header[1:]], cells))
    if not parts:
        return ""
    note = "Bits per byte by where in its document a byte is; the base reads rows of its own context, the others of the longer one."
    return f"<h2>By position</h2>{''.join(parts)}<p class=note>{note}</p>"
