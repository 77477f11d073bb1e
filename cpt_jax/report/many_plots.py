"""The pictures of many runs: the trade between new and old, curves, and the law with its band; each narrow enough for a
phone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cpt_jax.laws.answer import HIGH, LOW, Answer
from cpt_jax.laws.fit import Law
from cpt_jax.laws.points import SAME_LENGTH
from cpt_jax.report.many import Curve
from cpt_jax.report.plots import ACCENT, DOMAIN_COLOURS, GREY, new_figure, saved
from cpt_jax.report.side_by_side import Setting

WIDTH, HEIGHT = 5.4, 3.7
BAND = "#cfe3ea"


def _colours(settings: Sequence[Setting]) -> list:
    """By share of replay, from pale to dark, where it differs; else one colour a setting."""
    shares = sorted({setting.runs[0].replay for setting in settings})
    if len(shares) < 2:
        return [DOMAIN_COLOURS[index % len(DOMAIN_COLOURS)] for index in range(len(settings))]
    from matplotlib import colormaps

    scale = colormaps["viridis"]
    return [scale(0.9 * (1 - shares.index(setting.runs[0].replay) / (len(shares) - 1))) for setting in settings]


def points_plot(settings: Sequence[Setting], front: Sequence[Setting], new: str, old: str, directory: Path) -> str:
    """New-domain against old-domain bits per byte, a point a setting (its seeds as dots, their range as a cross): down and
    left is better; the front as a line, numbered from the best on the new domain; the old domain's base as a dashed
    line."""
    figure, (axis,) = new_figure(1, WIDTH, HEIGHT)
    axis.grid(axis="x", color="#e6e8ec", linewidth=0.8)
    for setting, colour in zip(settings, _colours(settings), strict=True):
        x, y = setting.values(new), setting.values(old)
        if len(x) > 1:
            axis.plot([min(x), max(x)], [setting.mean(old)] * 2, color=colour, linewidth=1.2, zorder=2)
            axis.plot([setting.mean(new)] * 2, [min(y), max(y)], color=colour, linewidth=1.2, zorder=2)
            axis.scatter(x, y, s=9, color=colour, alpha=0.6, zorder=3)
        axis.scatter(setting.mean(new), setting.mean(old), s=52, color=[colour], edgecolor="white", zorder=4)
    axis.plot(
        [s.mean(new) for s in front], [s.mean(old) for s in front], color=ACCENT, linewidth=1.2, alpha=0.7, zorder=1
    )
    base = settings[0].runs[0].base[old]
    axis.axhline(base, color=GREY, linestyle="--", linewidth=1, zorder=0)
    axis.annotate(f"base {base:.3f}", (1, base), xycoords=("axes fraction", "data"), xytext=(0, 3),
                  textcoords="offset points", ha="right", fontsize=8, color=GREY)  # fmt: skip
    axis.margins(x=0.14, y=0.1)
    axis.set_xlabel(f"{new}: bits per byte")
    axis.set_ylabel(f"{old}: bits per byte")
    _write_numbers(axis, [(setting.mean(new), setting.mean(old)) for setting in front])
    return saved(figure, directory, "runs")


def _write_numbers(axis, places: Sequence[tuple[float, float]]) -> None:
    """Numbers from 1 beside points; where the next one would be written over, both stand together: "2-4"."""
    # The scales are final once the figure was laid out.
    axis.figure.draw_without_rendering()
    x, y = (axis.transData.transform(places) * 72 / axis.figure.dpi).T
    groups: list[list[int]] = []
    for index in range(len(places)):
        if groups:
            first = groups[-1][0]
            width = 7 * len(_numbers(groups[-1])) + 3
            if x[index] - x[first] < width and abs(y[index] - y[first]) < 11:
                groups[-1].append(index)
                continue
        groups.append([index])
    for group in groups:
        axis.annotate(
            _numbers(group),
            places[group[0]],
            xytext=(7, 5),
            textcoords="offset points",
            fontsize=9,
            fontweight="bold",
        )


def _numbers(group: Sequence[int]) -> str:
    first, last = group[0] + 1, group[-1] + 1
    return str(first) if first == last else f"{first}-{last}"


def curve_plot(settings: Sequence[Setting], domain: str, directory: Path) -> str:
    """One domain's loss over the tokens, a line a run: bits per byte where it was watched, else nats a token of the
    training text; the empty string where there is neither."""
    watched = all(domain in run.watched for setting in settings for run in setting.runs)
    if not watched and not any(domain in run.losses for setting in settings for run in setting.runs):
        return ""
    figure, (axis,) = new_figure(1, WIDTH, HEIGHT)
    for setting, colour in zip(settings, _colours(settings), strict=True):
        for number, run in enumerate(setting.runs):
            curve = run.watched[domain] if watched else _running_mean(run.losses.get(domain, []))
            if curve:
                x, y = zip(*curve, strict=True)
                label = setting.label if number == 0 and len(settings) <= 8 else None
                axis.plot(x, y, color=colour, linewidth=1.5, alpha=1 if number == 0 else 0.5, label=label)
    if watched:
        axis.axhline(settings[0].runs[0].base[domain], color=GREY, linestyle="--", linewidth=1)
    axis.set_title(domain, loc="left", fontweight="bold")
    axis.set_xlabel("tokens")
    axis.set_ylabel("bits per byte, held out" if watched else "training loss, nats per token")
    axis.xaxis.set_major_formatter(lambda value, _: tokens_text(value))
    if len(settings) <= 8:
        axis.legend(frameon=False, fontsize=7.5)
    return saved(figure, directory, f"curve-{domain}")


def _running_mean(curve: Curve) -> Curve:
    """The mean of the last 15 steps."""
    values = [value for _, value in curve]
    return [
        (tokens, sum(values[max(0, n - 14) : n + 1]) / len(values[max(0, n - 14) : n + 1]))
        for n, (tokens, _) in enumerate(curve)
    ]


def tokens_text(value: float) -> str:
    """A number of tokens in short: 250k, 1.5M, 20B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def law_plot(law: Law, answer: Answer, unit: str, directory: Path) -> str:
    """A domain's loss against the share of replay: runs, the law and its 90% band; on the old domain the budget and the
    shares that keep it."""
    figure, (axis,) = new_figure(1, WIDTH, HEIGHT)
    smallest, largest = answer.measured
    shares = np.linspace(np.sqrt(smallest), np.sqrt(largest), 200) ** 2
    low, high = np.quantile(law.predict_draws(shares, answer.tokens, answer.size), [LOW, HIGH], axis=0)
    axis.fill_between(shares, low, high, color=BAND, linewidth=0, zorder=1, label="90% band")
    axis.plot(
        shares, law.predict(shares, answer.tokens, answer.size), color=ACCENT, linewidth=1.8, zorder=2, label="law"
    )
    of_law = [
        point
        for point in law.points
        if 1 / SAME_LENGTH <= point.tokens / answer.tokens <= SAME_LENGTH and point.size in (answer.size, None)
    ]
    others = [p for p in law.points if p not in of_law]
    for points, colour, name in ((others, "#b9bec7", "runs of other tokens or sizes"), (of_law, "#1c2127", "runs")):
        if points:
            axis.scatter(
                [p.share for p in points],
                [p.losses[law.domain] for p in points],
                s=20,
                color=colour,
                label=name,
                zorder=3,
            )
    if not law.is_new:
        axis.axhline(
            answer.budget.limit(answer.base),
            color=DOMAIN_COLOURS[1],
            linestyle="--",
            linewidth=1.1,
            label=f"at most {answer.budget.words(answer.base)}",
        )
        if np.isfinite(answer.replay.low):
            axis.axvspan(
                answer.replay.low, min(answer.replay.high, largest), color=DOMAIN_COLOURS[1], alpha=0.14, linewidth=0
            )
    # Shares are tried by doubling: small ones shall be seen apart.
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    ticks = [tick for tick in (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1) if smallest <= tick <= largest]
    axis.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(smallest, largest * 1.02)
    axis.set_title(law.domain, loc="left", fontweight="bold")
    axis.set_xlabel("replay, share of the tokens")
    axis.set_ylabel(unit)
    axis.legend(frameon=False, fontsize=8)
    return saved(figure, directory, f"law-{law.domain}")


def held_out_text(law: Law) -> str:
    """How well the law predicts shares that it did not see, in words."""
    if not law.held_out:
        return f"{law.domain}: no share can be left out, so how well the law predicts others is not known"
    worst = max(law.held_out, key=lambda each: abs(each.error))
    if abs(worst.error) > 1:
        return f"{law.domain}: the law does not predict a share that is left out ({100 * worst.share:.3g}%, to more than 100%)"
    return (
        f"{law.domain}: shares left out are predicted to {law.held_out_error:.1%} on average, the worst ({100 * worst.share:.3g}%) to "
        f"{abs(worst.error):.1%}; R² {law.held_out_r_squared:.3f} there, {law.r_squared:.3f} on all runs"
    )
