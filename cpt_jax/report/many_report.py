"""The report over many runs: one self-contained page with the answer, the trade between new and old, curves, and every
run in a table."""

import html
import os
from collections.abc import Sequence
from pathlib import Path

from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import number_of
from cpt_jax.core.storage import write_text_atomic
from cpt_jax.core.stores import Location, written_beside
from cpt_jax.laws.answer import Budget, fit_both
from cpt_jax.report.law_page import Study, study_section
from cpt_jax.report.many import RunFacts, common_domains, find_runs
from cpt_jax.report.many_plots import curve_plot, points_plot
from cpt_jax.report.page import page
from cpt_jax.report.side_by_side import Setting, alike, columns_of, pareto_front, points_of, settings_of_runs

BUDGET = Budget(amount=0.01)
STYLE = """
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 0 1.4rem; }
.sortable th { cursor: pointer; } .sortable th[data-order="1"]::after { content: " ▲"; } .sortable
th[data-order="-1"]::after { content: " ▼"; } .sortable td a { color: inherit; } tr.front td:first-child { border-left:
3px solid var(--accent); } .runs { white-space: normal; min-width: 9rem; max-width: 20rem; } .answer p { overflow-wrap: anywhere; } li { overflow-wrap: anywhere; }
"""
# Sorts a table by the column whose head is touched, by `data-value` where a cell has one.
SCRIPT = """<script>
document.querySelectorAll("table.sortable").forEach(table => table.querySelectorAll("th").forEach((head, column) =>
  head.addEventListener("click", () => {
    const order = head.dataset.order === "1" ? -1 : 1, body = table.tBodies[0];
    table.querySelectorAll("th").forEach(other => delete other.dataset.order);
    head.dataset.order = order;
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const compare = (a, b) => isNaN(value(a)) || isNaN(value(b))
      ? value(a).localeCompare(value(b), undefined, {numeric: true}) : value(a) - value(b);
    [...body.rows].sort((a, b) => order * compare(a, b)).forEach(row => body.append(row));
  })));
</script>"""


def write_runs_report(paths: Sequence[Location], out: Location) -> Location:
    """Writes a page over the runs of these directories (runs, or sweeps with runs/), also of those in a store, and
    plots/*.png beside it.

    Raises:
      UserError: a directory holds no run, none has ended, or the runs have no domain in common.
    """
    runs, left_out = find_runs(paths)
    of_one = len(paths) == 1 or {str(path).rpartition("/")[0] for path in paths} == {
        f"{str(out).rpartition('/')[0]}/runs"
    }
    with written_beside(out) as page:
        _write(runs, left_out, page, of_one=of_one)
    return out


def _write(runs: Sequence[RunFacts], left_out: Sequence[str], out: Path, *, of_one: bool) -> None:
    domains, plots = common_domains(runs), out.parent / "plots"
    settings = settings_of_runs(runs)
    new, old = (
        next((n for n, role in domains.items() if role in roles), None) for roles in (("new",), ("replay", "watch"))
    )
    front = pareto_front(settings, new, old) if new and old else []
    answer, law = _law(runs, new, old, plots) if new and old else ([], "")
    sections = [
        _trade(settings, front, new, old, answer, plots) if new and old else "",
        law,
        _table(settings, front, list(domains), out),
        _curves(settings, list(domains), plots),
        _left_out(left_out),
    ]
    seeds = f", {len(runs)} with their seeds" if len(settings) < len(runs) else ""
    title = html.escape(out.parent.resolve().name if of_one else "Runs compared")
    subtitle = f"{number_of(len(settings), 'setting')}{seeds}; changes are from each run's own base"
    write_text_atomic(out, page(title, subtitle, "".join(sections) + SCRIPT, STYLE))


def _trade(
    settings: Sequence[Setting], front: Sequence[Setting], new: str, old: str, answer: Sequence[str], plots: Path
) -> str:
    best = front[0]
    words = [
        f"The best on <b>{html.escape(new)}</b> is <b>{html.escape(best.label)}</b>: {best.mean(new):.3f} bits per byte "
        f"({best.change(new):+.1%}), with {html.escape(old)} at {best.mean(old):.3f} ({best.change(old):+.1%})."
    ]
    if len(front) > 1:
        keeper = front[-1]
        words.append(
            f"The best on <b>{html.escape(old)}</b> of those that no other beats on both is <b>{html.escape(keeper.label)}</b>: "
            f"{keeper.mean(old):.3f} ({keeper.change(old):+.1%}), with {html.escape(new)} at {keeper.mean(new):.3f} ({keeper.change(new):+.1%})."
        )
    names = "".join(f"<li>{html.escape(setting.label)}</li>" for setting in front)
    note = f"The Pareto front, from best on {html.escape(new)} to best on {html.escape(old)}; down and left is better, the base dashed."
    return (
        f'<div class="answer">{"".join(f"<p>{line}</p>" for line in [*words, *answer])}</div><h2>New against old</h2>'
        f"<figure class=small>{points_plot(settings, front, new, old, plots)}</figure>"
        f"<p class=note>{note}</p><ol class=note>{names}</ol>"
    )


def _law(runs: Sequence[RunFacts], new: str, old: str, plots: Path) -> tuple[list[str], str]:
    """The answer for the top of the page, if there is a law, and the law's section."""
    of_law, others = alike(runs)
    if len({run.planned for run in of_law}) == 1:
        return [], ""
    points = points_of(of_law)
    try:
        study = Study.of(points, fit_both(points, old, new), BUDGET)
    except UserError as error:
        return [], f"<h2>How much to replay</h2><p>No law was fitted: {html.escape(str(error))}.</p>"
    apart = f"; {len(others)} that differ in other settings are left out" if others else ""
    note = f"<p class=note>Fitted on {number_of(len(of_law), 'run')}{apart}.</p>"
    return [html.escape(study.asked.sentence)], study_section(study, "bits per byte", plots) + note


def _table(settings: Sequence[Setting], front: Sequence[Setting], domains: Sequence[str], out: Path) -> str:
    runs = [run for setting in settings for run in setting.runs]
    columns = columns_of(runs)
    seeds = any(len(setting.runs) > 1 for setting in settings)
    head = [*(["run"] if not columns else []), *columns, *(["seeds"] if seeds else []), *domains]
    lowest = {name: min(setting.mean(name) for setting in settings) for name in domains}
    rows = []
    for setting in settings:
        first = setting.runs[0]
        cells = [_cell(html.escape(cell(first)), _sortable(cell(first))) for cell in columns.values()] or [
            _cell(html.escape(first.name))
        ]
        cells[0] = cells[0].replace("</td>", f"{_links(setting, out)}</td>")
        cells += [_cell(str(len(setting.runs)))] if seeds else []
        for name in domains:
            mean, values = setting.mean(name), setting.values(name)
            spread = f", {min(values):.3f} to {max(values):.3f}" if len(values) > 1 else ""
            best = " ★" if mean == lowest[name] else ""
            text = f"{mean:.3f}{best}<small>{setting.change(name):+.1%}{spread}</small>"
            cells.append(_cell(text, f"{mean:.6f}", "best" if best else ""))
        rows.append(f"<tr{' class=front' if setting in front else ''}>{''.join(cells)}</tr>")
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    note = (
        "Bits per byte on held-out documents, with the change from the base"
        + (", the mean over the seeds and their range" if seeds else "")
        + "; ★ the lowest; a bar marks the Pareto front. Touch a column's head to sort."
    )
    return (
        f'<h2>Results</h2><div class="wide"><table class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div><p class=note>{note}</p>"
    )


def _cell(text: str, value: str | None = None, css: str = "") -> str:
    given = "" if value is None else f' data-value="{html.escape(value)}"'
    return f"<td{f' class={css}' if css else ''}{given}>{text}</td>"


def _sortable(text: str) -> str:
    """A number as one that sorts."""
    return text.replace(",", "").removesuffix("%")


def _links(setting: Setting, out: Path) -> str:
    """The runs of a setting, linked to their own reports where there are some."""
    links = []
    for run in setting.runs:
        report, name = Path(run.path) / "report.html", html.escape(run.name)
        place = html.escape(Path(os.path.relpath(report, out.parent)).as_posix())
        links.append(f'<a href="{place}">{name}</a>' if report.exists() else name)
    return f"<small class=runs>{', '.join(links)}</small>"


def _curves(settings: Sequence[Setting], domains: Sequence[str], plots: Path) -> str:
    drawn = [curve_plot(settings, name, plots) for name in domains]
    figures = "".join(f"<figure>{each}</figure>" for each in drawn if each)
    note = "From pale to dark: more replay." if len({s.runs[0].replay for s in settings}) > 1 else ""
    return f"<h2>While they trained</h2><div class=figures>{figures}</div><p class=note>{note}</p>" if figures else ""


def _left_out(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<h2>Left out</h2><ul class=note>{items}</ul>" if lines else ""
