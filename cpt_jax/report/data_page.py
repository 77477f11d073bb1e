"""What is in corpora, as figures, lines and a page: lengths, scripts, languages, what was left out and why."""

import collections
import html
from collections.abc import Sequence

from cpt_jax.data.filters import language_of
from cpt_jax.data.prepare import Manifest
from cpt_jax.report.page import page
from cpt_jax.report.plots import ACCENT, DOMAIN_COLOURS, PALE, new_figure, svg_text
from cpt_jax.report.tables import html_table

# Of each reason, and of what stays: texts on the page.
SHOWN_TEXTS = 5
STYLE = "details { margin: .4rem 0; } pre { max-height: 12rem; overflow-y: auto; } .swatch { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .4em; }"


def figures_of(manifest: Manifest, statistics: dict) -> dict:
    """All figures of one corpus, as JSON."""
    return {
        "name": manifest.name,
        "documents": manifest.records,
        "bytes": manifest.bytes,
        "characters": manifest.characters,
        "tokens": manifest.tokens if manifest.shards else None,
        "left_out": dict(sorted(manifest.skipped.items(), key=lambda entry: -entry[1])),
        "scripts": statistics["scripts"],
        "languages": _languages([text for _, text in statistics["kept"]]),
        "character_lengths": statistics["character_lengths"],
        "token_lengths": statistics["token_lengths"] if manifest.shards else None,
        "samples": {
            "kept": [text for _, text in statistics["kept"]][:SHOWN_TEXTS],
            "left_out": {
                reason: [text for _, text in entries][:SHOWN_TEXTS]
                for reason, entries in statistics["left_out"].items()
            },
        },
    }


def _languages(texts: Sequence[str]) -> dict[str, int] | None:
    """Sampled documents by their language; None where py3langid is not installed."""
    import importlib.util

    if importlib.util.find_spec("py3langid") is None:
        return None
    return dict(collections.Counter(map(language_of, texts)).most_common())


def _shares(counts: dict[str, int], most: int = 5) -> list[tuple[str, float]]:
    total = sum(counts.values()) or 1
    return [(name, count / total) for name, count in list(counts.items())[:most]]


def summary(figures: dict) -> str:
    """One corpus in a few lines."""
    left_out, read = figures["left_out"], figures["documents"] + sum(figures["left_out"].values())
    size = f"{figures['bytes'] / 1e6:,.2f} MB" + (f", {figures['tokens']:,} tokens" if figures["tokens"] else "")
    lines = [f"{figures['name']}: {figures['documents']:,} of {read:,} documents stay, {size}"]
    scripts = {name: count for name, count in figures["scripts"].items() if name not in ("Common", "Inherited")}
    lines.append("  scripts   " + ", ".join(f"{name} {share:.1%}" for name, share in _shares(scripts)))
    if figures["languages"]:
        lines.append("  languages " + ", ".join(f"{name} {share:.0%}" for name, share in _shares(figures["languages"])))
    lines += [f"  left out  {count:,} x {reason} ({count / read:.2%})" for reason, count in left_out.items()]
    return "\n".join(lines)


def data_page(corpora: Sequence[dict]) -> str:
    """A self-contained page about corpora."""
    rows = []
    for figures in corpora:
        left_out = sum(figures["left_out"].values())
        read = figures["documents"] + left_out
        tokens = f"{figures['tokens']:,}" if figures["tokens"] else "–"
        share = f"{left_out:,} <small>{left_out / read:.1%}</small>"
        size = f"{figures['bytes'] / 1e6:,.2f} MB"
        rows.append([html.escape(figures["name"]), f"{figures['documents']:,}", size, tokens, share])
    body = html_table(["corpus", "documents", "text", "tokens", "left out"], rows)
    body += f"<h2>How long the documents are</h2><figure>{_lengths_plot(corpora)}</figure>"
    body += f"<h2>Scripts and languages</h2><figure>{_scripts_plot(corpora)}</figure>{_language_table(corpora)}"
    for figures in corpora:
        body += _left_out_section(figures) + _kept_section(figures)
    return page("What is in the data", "cpt data stats", body, STYLE)


def _edges(place: int) -> tuple[float, float]:
    return (2 ** (place / 2), 2 ** ((place + 1) / 2)) if place >= 0 else (0.0, 1.0)


def _lengths_plot(corpora: Sequence[dict]) -> str:
    """Documents by length, on a logarithmic axis: in tokens where they are known, and in characters."""
    kinds = [("character_lengths", "characters")]
    if any(figures["token_lengths"] for figures in corpora):
        kinds.insert(0, ("token_lengths", "tokens"))
    figure, axes = new_figure(len(kinds), 4.8 * len(kinds), 2.9)
    for axis, (field, unit) in zip(axes, kinds, strict=True):
        for index, figures in enumerate(corpora):
            if not figures[field]:
                continue
            places = sorted(map(int, figures[field]))
            places = list(range(places[0], places[-1] + 1))
            total = sum(figures[field].values())
            shares = [figures[field].get(str(place), 0) / total * 100 for place in places]
            edges = [_edges(place)[0] for place in places] + [_edges(places[-1])[1]]
            colour = DOMAIN_COLOURS[index % len(DOMAIN_COLOURS)]
            axis.stairs(shares, edges, color=colour, linewidth=1.7, fill=len(corpora) == 1, label=figures["name"])
        axis.set_xscale("log")
        axis.set_xlabel(f"{unit} of a document")
        axis.set_ylabel("% of documents")
        axis.legend(frameon=False, fontsize=8)
    return svg_text(figure)


def _scripts_plot(corpora: Sequence[dict]) -> str:
    """Each corpus's characters by script; spaces, digits and punctuation, which have none, left out."""
    figure, (axis,) = new_figure(1, 9.6, 0.9 + 0.45 * len(corpora))
    axis.grid(False)
    colours = dict(zip(_commonest_scripts(corpora), (ACCENT, *DOMAIN_COLOURS[1:]), strict=False))
    for row, figures in enumerate(corpora):
        scripts = {name: count for name, count in figures["scripts"].items() if name not in ("Common", "Inherited")}
        total, left = sum(scripts.values()) or 1, 0.0
        for name in [*colours, None]:
            count = scripts.get(name, 0) if name else sum(n for s, n in scripts.items() if s not in colours)
            share = count / total * 100
            axis.barh(
                row,
                share,
                left=left,
                color=colours.get(name, PALE),
                height=0.6,
                label=name or "others" if not row else None,
            )
            if share > 6:
                axis.text(
                    left + share / 2,
                    row,
                    f"{name or 'others'} {share:.0f}%",
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=8,
                )
            left += share
    axis.set_yticks(range(len(corpora)), [figures["name"] for figures in corpora])
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of letters")
    return svg_text(figure)


def _commonest_scripts(corpora: Sequence[dict]) -> list[str]:
    total: collections.Counter[str] = collections.Counter()
    for figures in corpora:
        size = sum(figures["scripts"].values()) or 1
        total.update({name: count / size for name, count in figures["scripts"].items()})
    return [name for name, _ in total.most_common() if name not in ("Common", "Inherited")][: len(DOMAIN_COLOURS)]


def _language_table(corpora: Sequence[dict]) -> str:
    if not all(figures["languages"] for figures in corpora):
        return "<p class=note>Languages are told where py3langid is installed (pip install py3langid).</p>"
    rows = [
        [
            html.escape(figures["name"]),
            ", ".join(f"{name} {share:.0%}" for name, share in _shares(figures["languages"], 8)),
        ]
        for figures in corpora
    ]
    count = max(sum(figures["languages"].values()) for figures in corpora)
    note = f"<p class=note>Of up to {count} documents each, by py3langid, which is often wrong about short texts and code.</p>"
    return html_table(["corpus", "languages"], rows) + note


def _left_out_section(figures: dict) -> str:
    name, left_out = html.escape(figures["name"]), figures["left_out"]
    if not left_out:
        return f"<h2>{name}: nothing was left out</h2>"
    read = figures["documents"] + sum(left_out.values())
    rows = [[html.escape(reason), f"{count:,}", f"{count / read:.2%}"] for reason, count in left_out.items()]
    samples = "".join(
        f"<details><summary>{html.escape(reason)}</summary>{_texts(texts)}</details>"
        for reason, texts in figures["samples"]["left_out"].items()
    )
    return f"<h2>{name}: what was left out</h2>{html_table(['reason', 'documents', 'of all'], rows)}{samples}"


def _kept_section(figures: dict) -> str:
    texts = _texts(figures["samples"]["kept"])
    return f"<h2>{html.escape(figures['name'])}: what stays</h2><details open><summary>some of it</summary>{texts}</details>"


def _texts(texts: Sequence[str]) -> str:
    return "".join(f"<pre>{html.escape(text)}</pre>" for text in texts)
