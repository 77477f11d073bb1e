"""How many pieces: fertility against the size of a vocabulary, as text, as a picture, and as a part of a page."""

import html
import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from cpt_jax.core.storage import write_bytes_atomic
from cpt_jax.report.plots import ACCENT, DOMAIN_COLOURS, GREY, new_figure, svg_text
from cpt_jax.report.tables import html_table, text_table


def curve_text(curve: dict) -> str:
    """The curve's table and what it says, as text."""
    header, rows = _curve_rows(curve)
    marked = [[("* " if point["new_tokens"] == curve["knee"] else "  ") + row[0], *row[1:]]
              for point, row in zip(curve["points"], rows, strict=True)]  # fmt: skip
    header[0] = "  " + header[0]
    title = f"{', '.join(curve['corpora'])}: held-out text ({curve['heldout_bytes']:,} bytes), {curve['method']}"
    return "\n".join([title, text_table([header, *marked]), *curve_sentences(curve)])


def _curve_rows(curve: dict) -> tuple[list[str], list[list[str]]]:
    points = curve["points"]
    header = ["new pieces", "tokens/character", "tokens"]
    costs = "parameters" in points[0]
    if costs:
        header += ["parameters added", "logits' share", "FLOPs/character"]
    rows = []
    for point in points:
        row = [
            f"{point['new_tokens']:,}",
            f"{point['tokens_per_character']:.3f}",
            f"{point['tokens_per_character'] / points[0]['tokens_per_character'] - 1:+.1%}"
            if point["new_tokens"]
            else "",
        ]
        if costs:
            change = point["flops_per_character"] / points[0]["flops_per_character"] - 1
            row += [
                f"{point['parameters'] / 1e6:,.2f} M",
                f"{point['logit_share']:.1%}",
                f"{point['flops_per_character'] / 1e6:,.0f} M" + (f" ({change:+.0%})" if point["new_tokens"] else ""),
            ]
        rows.append(row)
    return header, rows


def curve_sentences(curve: dict) -> list[str]:
    """The knee in words, and where a character costs the least to compute."""
    points = curve["points"][1:]
    if not points:
        return ["There is nothing to add."]
    place = [point["new_tokens"] for point in points].index(curve["knee"])
    rate = points[place]["tokens_per_character"]
    before, after = (_savings(part) for part in (points[: place + 1], points[place:]))
    sentence = f"The knee: {curve['knee']:,} pieces ({rate:.3f} tokens per character)"
    if after:
        sentence += f": beyond it, twice as many pieces save less than {(math.floor(1000 * max(after)) + 1) / 10:g}% of the tokens"
        sentence += f"; up to it, {math.floor(1000 * min(before)) / 10:g}% or more" if before else ""
    sentences = [sentence + "."]
    if "flops_per_character" in points[0]:
        best = min(points, key=lambda point: point["flops_per_character"])
        sentences.append(
            f"A character costs the fewest FLOPs with {best['new_tokens']:,} pieces "
            f"({best['flops_per_character'] / curve['points'][0]['flops_per_character'] - 1:+.0%} against the base)."
        )
    return sentences


def _savings(points: Sequence[dict]) -> list[float]:
    """The share of tokens that each doubling saves, between neighbouring points."""
    return [
        1 - (right["tokens_per_character"] / left["tokens_per_character"])
        ** (1 / math.log2(right["new_tokens"] / left["new_tokens"]))
        for left, right in itertools.pairwise(points)
    ]  # fmt: skip


# The picture


def curve_figure(curve: dict):
    """Fertility against the number of new pieces, and beside it, where the model is known, what they cost."""
    points, base = curve["points"][1:], curve["points"][0]
    costs = "parameters" in base
    figure, axes = new_figure(2 if costs else 1, 9.6 if costs else 5.6, 3.2)
    sizes = [point["new_tokens"] for point in points]
    rates = [point["tokens_per_character"] for point in points]
    axes[0].axhline(base["tokens_per_character"], color=GREY, linestyle="--", linewidth=1)
    axes[0].annotate(
        f"base {base['tokens_per_character']:.3f}", (sizes[0], base["tokens_per_character"]),
        xytext=(0, 3), textcoords="offset points", fontsize=8, color=GREY,
    )  # fmt: skip
    axes[0].plot(sizes, rates, color=ACCENT, marker="o", markersize=4, linewidth=1.8)
    for size, rate in zip(sizes, rates, strict=True):
        bold = "bold" if size == curve["knee"] else "normal"
        axes[0].annotate(
            f"{rate:.3f}", (size, rate), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8,
            fontweight=bold,
        )  # fmt: skip
    axes[0].set_ylabel("tokens per character, held-out text")
    axes[0].set_ylim(0, base["tokens_per_character"] * 1.12)
    if costs:
        _draw_costs(axes[1], points, base)
    for axis in axes:
        axis.axvline(curve["knee"], color=DOMAIN_COLOURS[1], linestyle=":", linewidth=1.2)
        axis.set_xscale("log", base=2)
        axis.minorticks_off()
        axis.set_xlabel("new pieces")
    labels = [f"{size / 1000:.3g}k" for size in sizes]
    axes[0].set_xticks(sizes, labels)
    if costs:
        added = [f"{label}\n+{point['parameters'] / 1e6:.2g}M" for label, point in zip(labels, points, strict=True)]
        axes[1].set_xticks(sizes, added)
        axes[1].set_xlabel("new pieces, and the parameters they add")
    axes[0].annotate(
        "knee", (curve["knee"], 0), xycoords=("data", "axes fraction"), xytext=(4, 5), textcoords="offset points",
        fontsize=8, color=DOMAIN_COLOURS[1],
    )  # fmt: skip
    return figure


def _draw_costs(axis, points: Sequence[dict], base: dict) -> None:
    sizes = [point["new_tokens"] for point in points]
    work = [point["flops_per_character"] / base["flops_per_character"] for point in points]
    share = [point["logit_share"] for point in points]
    for values, colour, name in (
        (work, ACCENT, "FLOPs per character, of the base's"),
        (share, DOMAIN_COLOURS[4], "logits' share of a token's FLOPs"),
    ):
        axis.plot(sizes, values, color=colour, marker="o", markersize=4, linewidth=1.8, label=name)
    axis.set_ylim(0, max(1.0, *work, *share) * 1.05)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.legend(frameon=False, fontsize=8)


def write_curve_picture(curve: dict, path: Path) -> None:
    """The curve as a PNG file."""
    from matplotlib import pyplot

    figure, picture = curve_figure(curve), io.BytesIO()
    figure.savefig(picture, format="png", dpi=130, facecolor="white")
    pyplot.close(figure)
    write_bytes_atomic(path, picture.getvalue())


def curve_section(curve: dict) -> str:
    """The table and the picture, with what they say, as HTML."""
    from matplotlib import pyplot

    header, rows = _curve_rows(curve)
    if not curve["points"][1:]:
        return "<h2>How many pieces?</h2><p class=note>There is nothing to add.</p>"
    rows = [
        [f"<td class=best>{cell} ★</td>" if number == 0 else f"<td class=best>{cell}</td>" for number, cell in enumerate(row)]
        if point["new_tokens"] == curve["knee"]
        else row
        for point, row in zip(curve["points"], rows, strict=True)
    ]  # fmt: skip
    figure = curve_figure(curve)
    picture = svg_text(figure)
    pyplot.close(figure)
    words = "".join(f"<p>{sentence}</p>" for sentence in curve_sentences(curve))
    names = html.escape(", ".join(curve["corpora"]))
    note = (
        f"Learnt by {curve['method']} from {curve['learnt_bytes']:,} bytes of {names}; measured on {curve['heldout_bytes']:,} bytes held out by hash. "
        "FLOPs are those of a forward pass without attention's products; the logits are the output table's part. ★ the knee."
    )
    return (
        f'<h2>How many pieces?</h2><div class="answer">{words}</div><figure>{picture}</figure>'
        f"{html_table(header, rows)}<p class=note>{note}</p>"
    )
