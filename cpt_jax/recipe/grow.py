"""The vocabulary's station: the tokenizer extended and checked."""

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import number_of, say
from cpt_jax.core.storage import replace_directory, write_json_atomic
from cpt_jax.recipe.recipe import Vocabulary
from cpt_jax.vocab.extend import extend
from cpt_jax.vocab.fertility import compare
from cpt_jax.vocab.gate import check, piece_use
from cpt_jax.vocab.tokenizer import Tokenizer

Texts = Callable[[], Iterable[str]]


def check_fits(tokenizer: Tokenizer, rows: int, directory: Path) -> None:
    """Raises UserError when a tokenizer has ids that the embedding has no rows for."""
    if tokenizer.size > rows:
        raise UserError(
            f"the tokenizer in {tokenizer.directory} has {tokenizer.size:,} pieces but the embedding in {directory} has {rows:,} rows: "
            "run `cpt model extend`, or give the tokenizer that belongs to the model"
        )


def grow_tokenizer(
    base: Path,
    vocabulary: Vocabulary,
    new: Texts,
    old: Texts,
    heldout: dict[str, list[str]],
    old_names: list[str],
    out: Path,
    report: Path | None,
) -> dict:
    """Writes the extended tokenizer into `out`, and its figures into `report`; or refuses it, and leaves all as it was.

    Args:
      new: training text of the new domains; old: of the domains whose tokenisation is to stay.
      heldout: held-out texts by domain, for the figures.
    """
    extension, pending = vocabulary.extension, out.with_name(out.name + ".unchecked")
    try:
        done = extend(base, extension, new(), old(), pending, drop_unreachable=vocabulary.drop_unreachable)
        say(f"tokenizer: checking {number_of(done.new_pieces, 'new piece')}")
        before, after = Tokenizer(base), Tokenizer(pending)
        corpora = [compare(name, before, after, texts) for name, texts in heldout.items()]
        use = piece_use(before, after, new(), extension.candidates)
        check(before, after, heldout, corpora, old_names, use, vocabulary.limits, extension)
        replace_directory(pending, out)
    finally:
        shutil.rmtree(pending, ignore_errors=True)
    figures = {"corpora": corpora, **dataclasses.asdict(use), **dataclasses.asdict(done)}
    if report is not None:
        write_json_atomic(report, figures)
    return figures
