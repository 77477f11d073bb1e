"""`cpt law`: how much to replay, from runs or from a table of what others measured."""

import html
import math
from collections.abc import Sequence
from pathlib import Path

from cpt_jax.core.errors import UserError, nearest
from cpt_jax.core.storage import write_text_atomic
from cpt_jax.core.stores import Location, fetched, is_address, write_json, written_beside
from cpt_jax.laws.answer import Budget, fit_both
from cpt_jax.laws.points import Point, read_points
from cpt_jax.report.law_page import Study, study_section, study_text
from cpt_jax.report.many import find_runs
from cpt_jax.report.many_report import STYLE
from cpt_jax.report.page import page
from cpt_jax.report.side_by_side import alike, points_of


def law(
    *,
    sources: Sequence[Location],
    old: str,
    new: str,
    budget: str,
    tokens: float | None,
    size: float | None,
    json_path: Location | None,
    html_path: Location | None,
) -> None:
    """Fits the laws of two domains on runs, sweeps and tables, and prints the answer."""
    for name, value in (("tokens", tokens), ("size", size)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} is {value:g}: give a number above 0, of the run to be planned")
    allowed, (points, unit, notes) = Budget.parse(budget), _points(sources)
    known = sorted({name for point in points for name in point.losses})
    for name in (old, new):
        if name not in known:
            raise UserError(f"no run has the domain {nearest(name, known)}; there are: {', '.join(known)}")
    study = Study.of(points, fit_both(points, old, new), allowed, tokens, size)
    print("\n".join([study_text(study), *(f"note: {note}" for note in notes)]))
    if json_path is not None:
        write_json(json_path, study.as_json())
    if html_path is not None:
        body = f'<div class="answer"><p>{html.escape(study.asked.sentence)}</p></div>'
        runs, title = len(study.laws[0].points), f"{html.escape(old)} and {html.escape(new)}"
        with written_beside(html_path) as path:
            body += study_section(study, unit, path.parent / "plots")
            body += "".join(f"<p class=note>{html.escape(note)}</p>" for note in notes)
            write_text_atomic(path, page(title, f"a law of {runs} runs", body, STYLE))
        print(html_path)


def _is_table(source: Location) -> bool:
    return str(source).endswith((".csv", ".jsonl")) or not (is_address(source) or Path(source).exists())


def _points(sources: Sequence[Location]) -> tuple[list[Point], str, list[str]]:
    """The points, the unit of their losses, and what was left out."""
    tables = [source for source in sources if _is_table(source)]
    if tables and len(tables) < len(sources):
        raise UserError(f"{tables[0]} is a table among runs: give tables or runs, whose losses may be in other units")
    if tables:
        points = []
        for table in tables:
            with fetched(table) as path:
                points += read_points(path)
        return points, "loss", []
    runs, notes = find_runs(sources)
    used, others = alike(runs)
    if others:
        notes.append(
            f"{len(others)} of {len(runs)} runs differ in other settings than share, tokens, size and seed, or divide new or replayed text otherwise among "
            f"several domains, and are left out "
            f"({others[0].name}, for one)"
        )
    return points_of(used), "bits per byte", notes
