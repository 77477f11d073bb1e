"""What the experiments on the small base found: figures out of finished sweeps, tables and plots.

`python -m experiments.answers SWEEP...` takes the figures of finished runs (directories that `cpt sweep` made, or `cpt run`'s runs beside one another) into `experiments/results/`, one file
a sweep; without a sweep it prints the tables of `experiments/README.md` from there and draws its plots.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from cpt_jax.core.storage import write_json_atomic
from cpt_jax.report.plots import ACCENT, DOMAIN_COLOURS, GREY, new_figure, saved
from cpt_jax.report.run_report import evaluations_in
from experiments.replay_share import SHARES

RESULTS, PLOTS = Path("experiments/results"), Path("experiments/plots")
# Of the forgetting without replay (Ibrahim et al. 2024, arXiv 2403.08763, table 2: German, 405M).
PUBLISHED = {0.01: 0.52, 0.05: 0.71, 0.1: 0.79, 0.25: 0.88, 0.5: 0.95}


def collect(sweep: Path) -> None:
    """The evaluations of the runs that are there."""
    out = RESULTS / f"{sweep.name}.json"
    found = json.loads(out.read_text()) if out.exists() else {}
    for path in sorted(sweep.glob("runs/*/eval.json")):
        stages = [stage["name"] for stage in json.loads((path.parent / "config.json").read_text())["stages"]]
        entries = evaluations_in(path.read_text())
        if not any(entry["stage"] == stages[-1] for entry in entries):
            continue
        figures: dict[str, dict[str, float]] = {}
        for entry in entries:
            kind = {stages[-1]: entry["weights"], "export": "export"}.get(entry["stage"], entry["stage"])
            figures.setdefault(kind, {})[entry["domain"]] = round(entry["bits_per_byte"], 5)
        found[path.parent.name] = figures
    write_json_atomic(out, found)
    print(f"{out}: {len(found)} runs")


def of(sweep: str, setting: str, weights: str = "last") -> dict[str, np.ndarray]:
    """Bits per byte of a setting's seeds, by domain."""
    runs = json.loads((RESULTS / f"{sweep}.json").read_text())
    chosen = [figures for name, figures in runs.items() if name.rpartition("-")[0] == setting and weights in figures]
    return {
        domain: np.array([run[weights][domain] for run in chosen]) for domain in (chosen[0][weights] if chosen else {})
    }


def base(sweep: str) -> dict[str, float]:
    return next(iter(json.loads((RESULTS / f"{sweep}.json").read_text()).values()))["base"]


def cell(values: np.ndarray) -> str:
    spread = f" ± {(values.max() - values.min()) / 2:.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


Share = tuple[float, np.ndarray, np.ndarray]


def shares() -> dict[str, list[Share]]:
    """By new domain, (share of replay, the new domain, English) for the shares that were run."""
    found = {}
    for new in ("chinese", "code"):
        figures = [(share, of(f"replay-{new}", f"{new}-{share:.0%}")) for share in SHARES]
        found[new] = [(share, of_share[new], of_share["english"]) for share, of_share in figures if of_share]
    return found


def removed_of(points: list[Share], known: float) -> dict[float, float]:
    """By share, how much of the forgetting without replay is removed; nothing where that was not run."""
    if points[0][0]:
        return {}
    none = points[0][2].mean()
    return {share: 1 - (kept.mean() - known) / (none - known) for share, _, kept in points if share}


def replay_tables() -> None:
    for new, points in shares().items():
        before = base(f"replay-{new}")
        known = before["english"]
        rows = [["base", f"{before[new]:.3f}", f"{known:.3f}", "", "", ""]]
        removed = removed_of(points, known)
        for share, learnt, kept in points:
            ours = f"{removed[share]:.0%}" if share in removed else ""
            theirs = f"{PUBLISHED[share]:.0%}" if share in PUBLISHED else ""
            rows.append([f"{share:.0%}", cell(learnt), cell(kept), ours, theirs, str(len(kept))])
        print(table(["replay", new, "english", "of the forgetting removed", "published, German", "seeds"], rows) + "\n")


def smollm2_table() -> None:
    before = base("replay-smollm2")
    rows = [["base", f"{before['chinese']:.3f}", f"{before['english']:.3f}", ""]]
    for share in SHARES:
        if figures := of("replay-smollm2", f"smollm2-chinese-{share:.0%}"):
            rows.append(
                [f"{share:.0%}", cell(figures["chinese"]), cell(figures["english"]), str(len(figures["chinese"]))]
            )
    print(table(["replay", "chinese", "english", "seeds"], rows) + "\n")


def keeps_rows() -> list[tuple[str, np.ndarray, np.ndarray]]:
    rows = []
    for setting, weights, name in (
        ("nothing", "last", "nothing"),
        ("nothing", "ema", "nothing, EMA 0.99"),
        ("lower-rate", "last", "a third of the rate"),
        ("averaged-0.25", "export", "averaged with the base, 25%"),
        ("averaged-0.5", "export", "averaged with the base, 50%"),
        ("averaged-0.75", "export", "averaged with the base, 75%"),
        ("l2", "last", "L2 to the base"),
        ("l2-replay-5", "last", "L2 to the base, 5% replay"),
        ("mean-teacher", "last", "mean teacher"),
        ("anchor-0.2", "last", "anchor, weight 0.2"),
        ("anchor", "last", "anchor, weight 1"),
        ("anchor-replay-5", "last", "anchor on English, 5% replay"),
        ("lora-16", "last", "LoRA, rank 16"),
        ("lora-16-replay-5", "last", "LoRA, rank 16, 5% replay"),
        ("replay-5", "last", "5% replay"),
        ("replay-5", "ema", "5% replay, EMA 0.99"),
        ("replay-25", "last", "25% replay"),
        ("replay-25", "ema", "25% replay, EMA 0.99"),
    ):
        if figures := of("keeps", setting, weights):
            rows.append((name, figures["chinese"], figures["english"]))
    return rows


def other_tables() -> None:
    rows = [[name, cell(new), cell(old)] for name, new, old in keeps_rows()]
    print(table(["what keeps", "chinese", "english"], rows) + "\n")
    rows = []
    for setting in (
        "none",
        *(f"{n}-{way}" for n in (1000, 4000, 16000) for way in ("equal-text", "equal-compute", "rows-first")),
    ):
        if figures := of("growing", setting):
            rows.append([setting, cell(figures["chinese"]), cell(figures["english"])])
    print(table(["new pieces", "chinese", "english"], rows) + "\n")
    rows = []
    for setting in ("stay", "third", "third-at-once", "third-linear", "third-stable", "third-infinite", "peak"):
        figures, average = of("rewarming", setting), of("rewarming", setting, "ema")
        rows.append([setting, *(cell(each[name]) for each in (figures, average) for name in ("chinese", "english"))])
    print(table(["learning rate", "chinese", "english", "chinese, EMA", "english, EMA"], rows))


def plot_shares() -> None:
    figure, axes = new_figure(2, 8.6, 3.2)
    for axis, (new, points) in zip(axes, shares().items(), strict=True):
        for place, colour, name in ((2, ACCENT, "english"), (1, DOMAIN_COLOURS[1], new)):
            means = [point[place].mean() for point in points]
            spread = [[m - point[place].min() for m, point in zip(means, points, strict=True)],
                      [point[place].max() - m for m, point in zip(means, points, strict=True)]]  # fmt: skip
            axis.errorbar(
                [max(point[0], 0.003) for point in points], means, yerr=spread, fmt="o-", color=colour, label=name
            )
        axis.axhline(base(f"replay-{new}")["english"], color=GREY, linestyle="--", linewidth=1, label="english, base")
        axis.set_xscale("log")
        axis.set_xticks([max(point[0], 0.003) for point in points], [f"{point[0]:.0%}" for point in points])
        axis.minorticks_off()
        axis.set_xlabel("share of replay")
        axis.set_ylabel("bits per byte")
        axis.set_title(new, loc="left", fontweight="bold")
        axis.legend(frameon=False, fontsize=8)
    saved(figure, PLOTS, "replay_share")


def plot_keeps() -> None:
    figure, (axis,) = new_figure(1, 7.6, 4.6)
    # Moving averages lie on their runs.
    for name, new, old in [row for row in keeps_rows() if "EMA" not in row[0]]:
        replayed, averaged = "replay" in name, "averaged" in name
        colour = ACCENT if replayed else DOMAIN_COLOURS[2] if averaged else DOMAIN_COLOURS[1]
        axis.errorbar(
            new.mean(), old.mean(),
            xerr=[[new.mean() - new.min()], [new.max() - new.mean()]], yerr=[[old.mean() - old.min()], [old.max() - old.mean()]],
            fmt="o", color=colour, markersize=5, linewidth=1,
        )  # fmt: skip
        left = new.mean() > 4
        place = (-6, 4) if left else (5, 4) if name != "anchor, weight 0.2" else (5, -10)
        axis.annotate(
            name,
            (new.mean(), old.mean()),
            xytext=place,
            textcoords="offset points",
            fontsize=7,
            ha="right" if left else "left",
        )
    axis.axhline(base("keeps")["english"], color=GREY, linestyle="--", linewidth=1)
    axis.set_xlabel("chinese: bits per byte")
    axis.set_ylabel("english: bits per byte")
    saved(figure, PLOTS, "what_keeps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", nargs="*", type=Path)
    arguments = parser.parse_args()
    for sweep in arguments.sweep:
        collect(sweep)
    if not arguments.sweep:
        replay_tables()
        smollm2_table()
        other_tables()
        plot_shares()
        plot_keeps()


if __name__ == "__main__":
    main()
