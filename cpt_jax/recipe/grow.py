"""The vocabulary's station: the tokenizer extended and checked, the embedding grown."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from cpt_jax.checkpoint.hf import load, save
from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.core.tree import flatten, unflatten
from cpt_jax.recipe.recipe import Vocabulary
from cpt_jax.vocab.extend import extend, old_segmentation
from cpt_jax.vocab.fertility import compare
from cpt_jax.vocab.gate import check, piece_use
from cpt_jax.vocab.init_rows import InitRows
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
    report: Path,
) -> None:
    """Writes the extended tokenizer into `out` and its figures into `report`, or refuses it.

    Args:
      new: training text of the new domains; old: of the domains whose tokenisation is to stay.
      heldout: held-out texts by domain, for the figures.
    """
    extend(base, vocabulary.extension, new(), old(), out)
    before, after = Tokenizer(base), Tokenizer(out)
    corpora = [compare(name, before, after, texts) for name, texts in heldout.items()]
    use = piece_use(before, after, new())
    check(before, after, corpora, old_names, use, vocabulary.limits)
    write_json_atomic(report, {"corpora": corpora, **dataclasses.asdict(use)})


def grow_model(model: Path, tokenizer: Path, initial_rows: InitRows, seed: int, out: Path) -> None:
    """Writes the model with a row for every piece of the extended tokenizer; the old rows are bit-identical.

    Raises:
      UserError: the tokenizers do not fit the model, or each other.
    """
    config, weights, hf_config = load(model)
    base, extended = Tokenizer(model), Tokenizer(tokenizer)
    check_fits(base, config.vocab_size, model)
    if extended.size < base.size:
        raise UserError(
            f"the tokenizer in {tokenizer} has {extended.size:,} pieces, fewer than the model's {base.size:,}"
        )
    pieces = old_segmentation(base, extended)
    flat = flatten(weights)
    for table in ("embed", "head"):
        if (rows := flat.get(f"{table}/base")) is not None:
            kept = rows[: base.size]
            flat[f"{table}/base"] = kept
            flat[f"{table}/new"] = initial_rows.build(np.asarray(kept, np.float32), pieces, seed).astype(rows.dtype)
    grown = dataclasses.replace(config, vocab_size=base.size, new_rows=len(pieces))
    save(out, grown, unflatten(flat), hf_config, tokenizer, dtype=flat["embed/base"].dtype)
