"""The report of a run: one self-contained HTML page that begins with the answer, and the domain table for the
terminal."""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from cpt_jax.checkpoint.hub import name_of_base
from cpt_jax.core.errors import UserError
from cpt_jax.core.journal import JOURNAL
from cpt_jax.core.progress import clock, number_of
from cpt_jax.core.storage import numbers, write_text_atomic
from cpt_jax.core.stores import Location, Store, is_address, read_from, refusals_are_told
from cpt_jax.report.goodput import GOODPUT_STYLE, goodput_section
from cpt_jax.report.page import page
from cpt_jax.report.plots import curves_plot, fertility_plot, stages_plot
from cpt_jax.report.positions import positions_section
from cpt_jax.report.samples_page import read_samples
from cpt_jax.report.tables import html_table, stage_label, text_table
from cpt_jax.report.watch_report import endings, watch_section
from cpt_jax.training.ending import ENDED
from cpt_jax.training.metrics import read_metrics

# What reports are made of.
SOURCES = {"config.json", "eval.json", "fertility.json", "timings.json", "manifest.json", "samples.md"}
SOURCES |= {"metrics.jsonl", "watch.jsonl", JOURNAL, ENDED}


def load_run(run: Path) -> tuple[dict, list[dict]]:
    """A run's recipe and evaluations, as their files have them.

    Raises:
      UserError: it is no run's directory, or nothing was evaluated yet.
    """
    if not (run / "config.json").exists() or not (run / "eval.json").exists():
        raise UserError(
            f"{run} is no run's directory, or nothing was evaluated in it yet (no config.json or eval.json)"
        )
    return json.loads((run / "config.json").read_text()), evaluations_in((run / "eval.json").read_text())


def evaluations_in(text: str) -> list[dict]:
    """Those of an eval.json; NaN where a model that has diverged was measured."""
    return [numbers(entry) for entry in json.loads(text)]


def final_label(config: dict) -> str:
    """How the run's result is labelled among its evaluations."""
    if config.get("export", {}).get("interpolate_base"):
        return "export"
    stages = config.get("stages") or []
    last = stages[-1]["name"] if stages else "extended" if config.get("vocabulary") or config.get("context") else "base"
    return last + (" EMA" if config.get("export", {}).get("weights") == "ema" else "")


def grid(entries: Sequence[dict]) -> tuple[list[str], dict[tuple[str, str], dict]]:
    """The labels of evaluations, in order, and the evaluations by label and domain."""
    labels = list(dict.fromkeys(stage_label(entry) for entry in entries))
    return labels, {(stage_label(entry), entry["domain"]): entry for entry in entries}


def lowest_of(entries: Sequence[dict], domains: Sequence[str]) -> dict[str, float]:
    """By domain, the lowest bits per byte; those of a model that has diverged are none."""
    found = {name: [entry["bits_per_byte"] for entry in entries if entry["domain"] == name] for name in domains}
    return {name: min(filter(math.isfinite, values), default=math.nan) for name, values in found.items()}


def domain_table(entries: Sequence[dict], domains: Sequence[str]) -> str:
    """Bits per byte by stage and domain, with the change from the base, as aligned text; the lowest is marked with
    *."""
    labels, cells = grid(entries)
    rows = [["bits per byte", *domains]]
    lowest = lowest_of(entries, domains)
    for label in labels:
        row = [label]
        for name in domains:
            value, base = cells[label, name]["bits_per_byte"], cells[labels[0], name]["bits_per_byte"]
            change = "" if label == labels[0] else f" ({value / base - 1:+.1%})"
            row.append(f"{value:.3f}{change}{'*' if value == lowest[name] else ' '}")
        rows.append(row)
    return f"{text_table(rows)}\n* the lowest"


def _answer(config: dict, entries: Sequence[dict], fertility: dict | None) -> str:
    labels, cells = grid(entries)
    final = final_label(config) if final_label(config) in labels else labels[-1]
    lines = []
    for domain in config["domains"]:
        name, role = domain["corpus"]["name"], domain["role"]
        before, after = cells[labels[0], name]["bits_per_byte"], cells[final, name]["bits_per_byte"]
        change = after / before - 1
        words = {
            "new": f"<b>{html.escape(name)}</b>, the new domain, went from {before:.3f} to <b>{after:.3f} bits per byte</b> ({change:+.1%}).",
            "replay": f"<b>{html.escape(name)}</b>, replayed, went from {before:.3f} to <b>{after:.3f}</b> ({change:+.1%}): "
            + ("nothing was forgotten." if change <= 0 else "some of it was forgotten."),
            "watch": f"<b>{html.escape(name)}</b>, never trained on, went from {before:.3f} to <b>{after:.3f}</b> ({change:+.1%}).",
        }[role]
        rates = next((c for c in (fertility or {}).get("corpora", []) if c["name"] == name), None)
        if rates and role == "new":
            words += f" It takes {rates['base']['tokens_per_character']:.2f} → {rates['extended']['tokens_per_character']:.2f} tokens per character."
        lines.append(f"<p>{words}</p>")
    return f'<div class="answer">{"".join(lines)}</div>'


def _domain_section(entries: Sequence[dict], domains: Sequence[str], plots: Path) -> str:
    labels, cells = grid(entries)
    lowest = lowest_of(entries, domains)
    rows = []
    for label in labels:
        row = [html.escape(label)]
        for name in domains:
            entry, base = cells[label, name], cells[labels[0], name]
            value = entry["bits_per_byte"]
            change = f"{value / base['bits_per_byte'] - 1:+.1%}" if label != labels[0] else f"{entry['bytes']:,} bytes"
            best = value == lowest[name]
            row.append(
                f"<td{' class=best' if best else ''}>{value:.3f}{' ★' if best else ''}<small>{change}</small></td>"
            )
        rows.append(row)
    note = "On held-out documents, whole, every byte counted once; changes are from the base on the same documents; ★ the lowest."
    table = html_table(["bits per byte", *map(html.escape, domains)], rows)
    return (
        f"<h2>What it knows</h2>{table}<p class=note>{note}</p><figure>{stages_plot(entries, domains, plots)}</figure>"
    )


def _vocabulary_section(fertility: dict, plots: Path) -> str:
    rows = [
        [
            html.escape(c["name"]),
            f"{c['base']['tokens_per_character']:.3f} → {c['extended']['tokens_per_character']:.3f}",
            f"{c['base']['bytes_per_token']:.2f} → {c['extended']['bytes_per_token']:.2f}",
            f"{c['documents_changed']:.1%}",
            str(c["round_trip_failures"]),
        ]
        for c in fertility["corpora"]
    ]
    header = [
        "held-out text",
        "tokens per character",
        "bytes per token",
        "documents tokenised differently",
        "round-trip failures",
    ]
    never = fertility["unreachable_pieces"]
    used = f"{fertility['new_pieces']:,} new pieces; " + (
        f"{never:,} of them never occur in the text they were learnt from: they are steps on the way to longer ones."
        if never
        else "all of them are in use in the text they were learnt from."
    )
    return (
        f"<h2>The vocabulary</h2>{html_table(header, rows)}<p class=note>{used}</p><figure class=small>{fertility_plot(fertility['corpora'], plots)}</figure>"
        + pieces_to_look_at(fertility)
    )


def visible(piece: str) -> str:
    """A piece as HTML in which white space can be seen."""
    return html.escape(piece.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥"))


def pieces_to_look_at(use: dict) -> str:
    """The most used and the longest new pieces (`gate.PieceUse` as a dict)."""
    frequent = "".join(
        f"<span>{visible(piece)} <small>{count:,}</small></span>" for piece, count in use["most_frequent"]
    )
    longest = "".join(f"<span>{visible(piece)}</span>" for piece in use["longest"])
    return f"<p class=note>Most used new pieces</p><div class=pieces>{frequent}</div><p class=note>Longest</p><div class=pieces>{longest}</div>"


def _stages(run: Path, config: dict) -> dict[str, Path]:
    """The directories of the recipe's stages that were begun; others may be left of an earlier recipe."""
    places = {stage["name"]: run / "stages" / f"{n}-{stage['name']}" for n, stage in enumerate(config["stages"], 1)}
    return {name: path for name, path in places.items() if path.is_dir()}


def _training_section(directories: dict[str, Path], plots: Path) -> str:
    files = {name: read_metrics(path) for name, path in directories.items()}
    stages = {name: lines for name, lines in files.items() if lines}
    if not stages:
        return ""
    rows = [
        [html.escape(name), f"{len(lines):,}", f"{sum(x['tokens'] for x in lines):,}", clock(sum(x["seconds"] for x in lines)),
         f"{sum(x['tokens'] for x in lines) / sum(x['seconds'] for x in lines):,.0f}"]
        for name, lines in stages.items()
    ]  # fmt: skip
    table = html_table(["stage", "steps", "tokens", "time", "tokens per second"], rows)
    left_out = [
        f"{number_of(int(count), 'document')} of {html.escape(key.partition('/')[2])} in {html.escape(name)}"
        for name, lines in stages.items()
        for key, count in lines[-1].items()
        if key.startswith("unreadable/")
    ]
    note = f"<p class=note>Could not be read and were left out: {', '.join(left_out)}.</p>" if left_out else ""
    return f"<h2>How it trained</h2>{table}{note}<figure>{curves_plot(stages, plots)}</figure>"


def _data_section(run: Path, domains: Sequence[str]) -> str:
    rows = []
    files = [run / "data" / name / "manifest.json" for name in domains]
    for path in filter(Path.exists, files):
        m = json.loads(path.read_text())
        skipped = ", ".join(f"{count:,} {html.escape(reason)}" for reason, count in m["skipped"].items()) or "none"
        rows.append(
            [html.escape(m["name"]), f"{m['records']:,}", f"{m['bytes'] / 1e6:,.2f} MB", f"{m['tokens']:,}", skipped]
        )
    return (
        f"<h2>What it read from</h2>{html_table(['domain', 'documents', 'text', 'tokens', 'left out'], rows)}"
        if rows
        else ""
    )


def _samples_section(run: Path) -> str:
    path = run / "samples.md"
    if not path.exists():
        return ""
    blocks = []
    for prompt, before, after in read_samples(path.read_text(encoding="utf-8")):
        sides = "".join(
            f"<div><span class=note>{side}</span><pre>{html.escape(text)}</pre></div>"
            for side, text in (("before", before), ("after", after))
        )
        blocks.append(f"<p><b>{html.escape(prompt)}</b></p><div class=pair>{sides}</div>")
    return f"<h2>Samples, continued greedily</h2>{''.join(blocks)}" if blocks else ""


def write_report(run: Location) -> Location:
    """Writes report.html into a run's directory, also one in a store, and plots/*.png. Parts whose files are not there
    are left out.

    Raises:
      UserError: it is no run's directory, or nothing was evaluated yet.
    """
    with read_from(run, is_reported) as path:
        page = _written(path)
        if is_address(run):
            with refusals_are_told(str(run)):
                Store(str(run)).upload(path, [page, *(path / "plots").iterdir()])
    return f"{run}/report.html" if is_address(run) else page


def is_reported(name: str) -> bool:
    """Whether reports are made of a file of this name."""
    return PurePosixPath(name).name in SOURCES or name.startswith("evaluations/")


def _written(run: Path) -> Path:
    config, entries = load_run(run)
    domains = [domain["corpus"]["name"] for domain in config["domains"]]
    plots = run / "plots"
    fertility = (
        json.loads((run / "fertility.json").read_text())
        if (run / "fertility.json").exists() and config.get("vocabulary")
        else None
    )
    timings = json.loads((run / "timings.json").read_text()) if (run / "timings.json").exists() else {}
    timing_rows = [[html.escape(name), clock(seconds)] for name, seconds in timings.items() if seconds >= 0.5]
    total = f" in {clock(sum(timings.values()))}" if timings else ""
    stages = _stages(run, config)
    sections = [
        _answer(config, entries, fertility) + endings(stages),
        _domain_section(entries, domains, plots),
        positions_section(entries, domains),
        _training_section(stages, plots),
        watch_section(run, stages, plots),
        _vocabulary_section(fertility, plots) if fertility else "",
        _samples_section(run),
        _data_section(run, domains),
        goodput_section(run),
        f"<h2>Where the time went</h2>{html_table(['station', 'time'], timing_rows)}" if timing_rows else "",
        f"<h2>The recipe</h2><details><summary>config.json, which replays this run</summary><pre>{html.escape(json.dumps(config, ensure_ascii=False, indent=2))}</pre></details>",
    ]
    name = html.escape(config["name"])
    base = html.escape(name_of_base(config["base"]))
    out = run / "report.html"
    write_text_atomic(out, page(name, f"continued pre-training of {base}{total}", "".join(sections), GOODPUT_STYLE))
    return out
