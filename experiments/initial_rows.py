"""Which initial rows are best for new pieces?

Question: SmolLM2-135M gets 2,000 pieces of Chinese statutes. What do held-out statutes cost, in bits per byte, after 0, 50 and 200 steps in which
only the new rows train, for every way to make the rows?

Expectation: `distilled` is best from the start, since it has already trained; of the free ones the uniform mean; `focus` cannot do much, as the base shares
few pieces with Chinese; `wechsel` better for the 787 of 2,000 pieces that have a vector; `random` and `mean` are far behind and stay so.

`python -m experiments.initial_rows` (three seeds: other batches, and other draws where rows are drawn). Results go to
`docs/initial_rows.json` one by one; what is there is not computed again.
"""

import json
import os
import time
from pathlib import Path

import numpy as np

from configs.quickstart import quickstart
from cpt_jax.checkpoint.base import resolve_base
from cpt_jax.core.progress import quiet_libraries, say
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.data.holdout import HeldApart
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.recipe.grow import grow_tokenizer
from cpt_jax.recipe.rows import Growth, Probe, RowProbe
from cpt_jax.vocab.init_rows import NAMED_ROWS, InitRows, Wechsel
from cpt_jax.vocab.static import word_vectors
from experiments.bilingual_vectors import write_vectors

OUT = Path("docs/initial_rows.json")
WORK = Path(".cache/initial_rows")
SEEDS = (0, 1, 2)
OPTIMIZER = AdamW(learning_rate=5e-3, new_rows_epsilon=1e-3)
PROBE = Probe(steps=(0, 50, 200), batch_size=1, sequence_length=128, optimizer=OPTIMIZER)


def growth() -> tuple[Growth, list[str]]:
    """The quickstart's model, tokenizer and data, and the held-out statutes."""
    recipe = quickstart()
    source = resolve_base(recipe.base, WORK / "source")
    parts = {domain.name: HeldApart(domain.corpus, domain.heldout, WORK) for domain in recipe.domains}
    heldout = {name: part.measured() for name, part in parts.items()}
    tokenizer = WORK / "tokenizer"
    assert recipe.vocabulary is not None
    if not tokenizer.exists():
        learn, keep = parts["statutes"].learnt, parts["english"].learnt
        grow_tokenizer(source, recipe.vocabulary, learn, keep, heldout, ["english"], tokenizer, None)
    return Growth(source, tokenizer, 0, parts["statutes"].learnt), heldout["statutes"]


def candidates(grown: Growth) -> dict[str, InitRows]:
    """Every kind, by name."""
    tokenizer = grown.extended
    old, new = write_vectors(tokenizer, WORK)
    known = sum(index >= grown.base.size for index in word_vectors(new, tokenizer))
    say(f"wechsel: {known:,} of {len(grown.pieces):,} new pieces have a vector")
    return NAMED_ROWS | {"wechsel": Wechsel(source=str(old), target=str(new))}


def table(results: list[dict]) -> str:
    """Markdown: means over seeds, and half the range after the last step."""
    steps = PROBE.steps
    lines = [
        "| rows | " + " | ".join(f"{step} steps" for step in steps) + " | seconds to make |",
        "|---" * (len(steps) + 2) + "|",
    ]
    names = list(dict.fromkeys(result["name"] for result in results))
    figures = {name: [r for r in results if r["name"] == name] for name in names}
    names.sort(key=lambda name: np.mean([r["bits_per_byte"][str(steps[-1])] for r in figures[name]]))
    for name in names:
        cells = []
        for step in steps:
            values = [r["bits_per_byte"][str(step)] for r in figures[name]]
            cells.append(f"{np.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}")
        cells.append(f"{np.mean([r['seconds'] for r in figures[name]]):.0f}")
        lines.append(f"| {name} ({len(figures[name])} seeds) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    quiet_libraries()
    results = json.loads(OUT.read_text()) if OUT.exists() else []
    grown, heldout = growth()
    prober = RowProbe(grown, heldout, PROBE)
    for seed in SEEDS:
        batches = None
        for name, candidate in candidates(grown).items():
            if any(result["name"] == name and result["seed"] == seed for result in results):
                continue
            batches = prober.batches(seed) if batches is None else batches
            started = time.monotonic()
            rows = grown.rows(candidate, seed)
            probed = prober.run(name, rows, batches, time.monotonic() - started)
            figures = {str(step): value for step, value in probed.bits_per_byte.items()}
            results.append({"name": name, "seed": seed, "bits_per_byte": figures, "seconds": probed.seconds})
            write_json_atomic(OUT, results)
            print(seed, name, figures, round(probed.seconds, 1), flush=True)
    print(table(results))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
