"""What does the law say of our own runs?

Question: of the small base that reads Chinese statutes or Python with 0 to 50% of English replayed (`replay_share`), how much replay keeps English within 5, 10 and 20%, and how well is a
share foretold by the law of the others?

Expectation: shares between others to a percent, no replay at all badly (as with the published runs: docs/replay.md).

`python -m experiments.replay_law` writes experiments/results/replay-chinese.csv and replay-code.csv from the .json beside them, tables for `cpt law`, and prints the answers. Seconds, of one core.
"""

import csv
import json
from pathlib import Path

from cpt_jax.laws.answer import Budget, answer, fit_both
from cpt_jax.laws.points import read_points
from cpt_jax.report.law_page import formula
from cpt_jax.report.many_plots import held_out_text

RESULTS = Path("experiments/results")
TOKENS = 2e6
BUDGETS = ("5%", "10%", "20%")


def write_table(new: str) -> Path:
    """A row a run, and the base's."""
    sweep = RESULTS / f"replay-{new}.json"
    runs = json.loads(sweep.read_text())
    rows = [["base", 0, "", "", *next(iter(runs.values()))["base"].values()]]
    for name, figures in runs.items():
        _, share, seed = name.split("-")
        rows.append([name, int(TOKENS), float(share.removesuffix("%")) / 100, seed, *figures["last"].values()])
    table = sweep.with_suffix(".csv")
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", "tokens", "share", "seed", *next(iter(runs.values()))["base"]])
        writer.writerows(rows)
    return table


def main() -> None:
    for new in ("chinese", "code"):
        points = read_points(write_table(new))
        laws = fit_both(points, "english", new)
        for budget in BUDGETS:
            print(answer(points, laws, Budget.parse(budget)).sentence)
        for law in laws:
            print(formula(law), held_out_text(law), sep="\n")
            for entry in {each.share: each for each in law.held_out}.values():
                runs = [each.error for each in law.held_out if each.share == entry.share]
                print(f"  {entry.share:.0%} left out: {100 * sum(runs) / len(runs):+.1f}% over {len(runs)} runs")


if __name__ == "__main__":
    main()
