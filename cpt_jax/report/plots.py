"""The report's pictures, as SVG text and PNG files."""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

ACCENT, GREY, PALE = "#1f6f8b", "#8a8f98", "#c9ced6"
DOMAIN_COLOURS = ("#1f6f8b", "#c8553d", "#6a7f3c", "#7d5ba6", "#b08900", "#4a5568")


def new_figure(columns: int, width: float, height: float):
    import matplotlib

    matplotlib.use("agg")
    # Text stays text, and the same data gives the same file.
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "cpt_jax", "font.family": "DejaVu Sans", "font.size": 9}
    )
    # A name with two dollar signs is no formula.
    matplotlib.rcParams["text.parse_math"] = False
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e6e8ec", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, list(axes[0])


def saved(figure, directory: Path, name: str) -> str:
    """Writes the figure as NAME.png into a directory, a slash in the name as a dash; its SVG text, to be put into a
    page."""
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    figure.savefig(directory / f"{name.replace('/', '-')}.png", dpi=160, facecolor="white")
    svg = svg_text(figure)
    pyplot.close(figure)
    return svg


def svg_text(figure) -> str:
    """A figure to be put into a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Sizes in points would not shrink on a phone; below some 0.7 of them nobody can read what is written.
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    least = round(0.7 * 72 * figure.get_figwidth())
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 style="min-width: {least}px"', svg, count=1)


def stages_plot(entries: Sequence[dict], domains: Sequence[str], directory: Path) -> str:
    """Bits per byte by stage, a panel a domain; the base as a dashed line."""
    figure, axes = new_figure(len(domains), 3.3 * len(domains), 2.7)
    for axis, domain in zip(axes, domains, strict=True):
        rows = [entry for entry in entries if entry["domain"] == domain]
        labels = [entry["stage"] + (" EMA" if entry["weights"] == "ema" else "") for entry in rows]
        values = [entry["bits_per_byte"] for entry in rows]
        # A model that has diverged has no bar.
        heights = [value if math.isfinite(value) else 0.0 for value in values]
        lowest = min((height for height in heights if height), default=0.0)
        axis.bar(range(len(rows)), heights, color=[ACCENT if h == lowest else PALE for h in heights], width=0.66)
        axis.axhline(heights[0], color=GREY, linestyle="--", linewidth=1, zorder=1)
        for index, (value, height) in enumerate(zip(values, heights, strict=True)):
            axis.annotate(
                f"{value:.3f}",
                (index, height),
                ha="center",
                va="bottom",
                fontsize=8,
                xytext=(0, 2),
                bbox={"color": "white", "pad": 0.4},
                textcoords="offset points",
            )
        axis.set_xticks(range(len(rows)), labels, rotation=35, ha="right")
        axis.set_ylim(0, max(heights) * 1.14 or 1.0)
        axis.set_title(domain, loc="left", fontweight="bold")
        axis.set_ylabel("bits per byte")
    return saved(figure, directory, "stages")


def _smooth(values: Sequence[float], span: int) -> list[float]:
    """A running mean, of which a value that is no number is no part."""
    smoothed, current = [], math.nan
    for value in values:
        if math.isfinite(value):
            current = value if math.isnan(current) else current + (value - current) * 2 / (span + 1)
        smoothed.append(current)
    return smoothed


def curves_plot(stages: dict[str, list[dict]], directory: Path) -> str:
    """Training loss by domain (a step's value pale, its running mean on top) and the learning rate, over all stages'
    steps."""
    figure, (loss, rate) = new_figure(2, 9.6, 3.0)
    names = sorted({key for lines in stages.values() for line in lines for key in line if key.startswith("nats/")})
    first, labelled = 0, set()
    for stage, lines in stages.items():
        steps = [first + line["step"] for line in lines]
        for index, name in enumerate(names):
            points = [(step, line[name]) for step, line in zip(steps, lines, strict=True) if name in line]
            if not points:
                continue
            x, y = [p[0] for p in points], [p[1] for p in points]
            colour = DOMAIN_COLOURS[index % len(DOMAIN_COLOURS)]
            loss.plot(x, y, color=colour, alpha=0.22, linewidth=0.8)
            loss.plot(
                x,
                # Of a few steps, a mean over fifteen would stay where they began.
                _smooth(y, min(15, 1 + len(y) // 10)),
                color=colour,
                linewidth=1.7,
                label=None if name in labelled else name.split("/", 1)[1],
            )
            labelled.add(name)
        rate.plot(steps, [line["learning_rate"] for line in lines], color=ACCENT, linewidth=1.7)
        for axis in (loss, rate):
            if first:
                axis.axvline(first + 0.5, color=GREY, linestyle=":", linewidth=1)
            middle = (first + steps[-1]) / 2
            axis.text(
                middle,
                1.01,
                stage,
                transform=axis.get_xaxis_transform(),
                fontsize=8,
                color=GREY,
                va="bottom",
                ha="center",
            )
        first = steps[-1]
    for axis in (loss, rate):
        # A stage's name is written in its middle, which has to be in the picture: of a single step it would not be.
        axis.set_xlim(0, first + 0.5)
    loss.set_ylabel("training loss, nats per token")
    rate.set_ylabel("learning rate")
    for axis in (loss, rate):
        axis.set_xlabel("step")
    if names:
        loss.legend(frameon=False, fontsize=8)
    rate.set_ylim(bottom=0)
    return saved(figure, directory, "curves")


def fertility_plot(corpora: Sequence[dict], directory: Path) -> str:
    """Tokens per character before and after, by corpus."""
    figure, (axis,) = new_figure(1, 5.2, 2.5)
    for index, corpus in enumerate(corpora):
        for offset, key, colour in ((-0.18, "base", PALE), (0.18, "extended", ACCENT)):
            value = corpus[key]["tokens_per_character"]
            axis.bar(index + offset, value, 0.34, color=colour, label=key if index == 0 else None)
            axis.annotate(f"{value:.3f}", (index + offset, value), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(corpora)), [corpus["name"] for corpus in corpora])
    axis.set_ylabel("tokens per character")
    axis.margins(y=0.12)
    axis.legend(frameon=False, fontsize=8)
    return saved(figure, directory, "fertility")


def watch_plot(stages: dict[str, list[dict]], base: dict[str, dict[str, float]], directory: Path) -> str:
    """Bits per byte on the watch's sample against step, a panel a domain, over all stages: the base dashed, steps at
    which the watch acted as points."""
    names = list(dict.fromkeys(name for lines in stages.values() for line in lines for name in line["bits_per_byte"]))
    figure, axes = new_figure(len(names), max(3.3 * len(names), 5.2), 2.7)
    for axis, name in zip(axes, names, strict=True):
        first = 0
        for stage, lines in stages.items():
            for field, style in (("average", "--"), ("bits_per_byte", "-")):
                points = [(first + line["step"], line[field][name]) for line in lines if name in line.get(field, {})]
                x, y = [point[0] for point in points], [point[1] for point in points]
                axis.plot(x, y, color=ACCENT, linestyle=style, linewidth=1.7)
            acted = [line for line in lines if line["action"] is not None and name in line["bits_per_byte"]]
            x = [first + line["step"] for line in acted]
            axis.scatter(x, [line["bits_per_byte"][name] for line in acted], color=DOMAIN_COLOURS[1], s=22, zorder=3)
            if name in base.get(stage, {}):
                axis.axhline(base[stage][name], color=GREY, linestyle="--", linewidth=1, zorder=1)
            first += lines[-1]["step"]
        axis.set_title(name, loc="left", fontweight="bold")
        axis.set_xlabel("step")
        axis.set_ylabel("bits per byte")
    return saved(figure, directory, "watch")
