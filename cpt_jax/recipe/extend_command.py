"""`cpt model extend`: a row for each new piece, of one kind or of the kind that learns best."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import number_of, quiet_libraries
from cpt_jax.core.stores import Location, refuse_existing, write_json, written_to
from cpt_jax.data.holdout import HeldApart, Holdout
from cpt_jax.data.sources import corpora_of, texts_of
from cpt_jax.recipe.find import find_model, find_tokenizer
from cpt_jax.recipe.recipe import Vocabulary
from cpt_jax.recipe.rows import Growth, Probe, best_rows
from cpt_jax.report.tables import text_table
from cpt_jax.vocab.init_rows import NAMED_ROWS, NEEDS_TEXT, InitRows, Wechsel


def model_extend(
    *,
    model: str,
    tokenizer: str,
    init: Sequence[str],
    corpora: Sequence[str],
    vectors: Sequence[str],
    probe_steps: int | None,
    text_field: str,
    seed: int,
    out: Location,
    json_path: Location | None,
) -> None:
    """`cpt model extend`: rows of one kind, or, with a probe, of the kind that is best after `probe_steps` steps.

    Raises:
      UserError: there is something at `out`, or what is needed for the rows is not given.
    """
    quiet_libraries()
    refuse_existing(out)
    if seed < 0:
        raise UserError(f"--seed is {seed}: give 0 or more")
    candidates = _candidates(init, vectors, probe_steps is not None)
    if needy := [name for name, rows in candidates.items() if isinstance(rows, NEEDS_TEXT) and not corpora]:
        raise UserError(f"rows {needy[0]!r} are made from text of the new domain: give --corpus SPEC")
    directory = find_tokenizer(tokenizer)
    if probe_steps is None:
        if len(candidates) > 1:
            raise UserError(
                f"--init names {len(candidates)} kinds of rows: give one, or --probe STEPS to choose by training"
            )
        with written_to(out) as local:
            growth = Growth(find_model(model), directory, seed, lambda: texts_of(corpora_of(corpora, text_field)))
            growth.save(growth.rows(next(iter(candidates.values()))), local)
        print(out)
        if json_path is not None:
            write_json(json_path, {"chosen": next(iter(candidates)), "probe": []})
        return
    if not corpora:
        raise UserError("--probe trains on text of the new domain: give --corpus SPEC")
    with tempfile.TemporaryDirectory() as place, written_to(out) as local:
        parts = [HeldApart(corpus, Holdout(), Path(place)) for corpus in corpora_of(corpora, text_field)]
        heldout = [text for part in parts for text in part.measured()]
        growth = Growth(find_model(model), directory, seed, lambda: (text for part in parts for text in part.learnt()))
        probe = Probe(steps=(0, probe_steps))
        rows, results = best_rows(growth, candidates, heldout, probe)
        growth.save(rows, local)
    table = [["rows: bits per byte, held out", "at once", f"after {number_of(probe_steps, 'step')}", "seconds to make"]]
    for result in results:
        before, after = result.bits_per_byte.values()
        table.append([result.name, f"{before:.3f}", f"{after:.3f}", f"{result.seconds:.0f}"])
    print(text_table(table))
    print(f"{out}: {results[0].name}, the best after {number_of(probe_steps, 'step')}")
    if json_path is not None:
        write_json(json_path, {"chosen": results[0].name, "probe": [dataclasses.asdict(r) for r in results]})


def _candidates(names: Sequence[str], vectors: Sequence[str], probed: bool) -> dict[str, InitRows]:
    known = NAMED_ROWS | ({"wechsel": Wechsel(source=vectors[0], target=vectors[1])} if vectors else {})
    if not names:
        return known if probed else {"default": Vocabulary().initial_rows}
    if "wechsel" in names and not vectors:
        raise UserError("rows 'wechsel' need word vectors of both languages: give --vectors OLD.vec NEW.vec")
    return {name: known[name] for name in names}
