"""The vocabulary's station: the tokenizer extended and checked, the embedding grown."""

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from cpt_jax.checkpoint.hf import load, save
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.progress import say
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.core.tree import flatten, unflatten
from cpt_jax.recipe.model import Model
from cpt_jax.recipe.recipe import Vocabulary
from cpt_jax.vocab.distil import FrozenModel
from cpt_jax.vocab.extend import extend, old_segmentation
from cpt_jax.vocab.fertility import compare
from cpt_jax.vocab.gate import check, piece_use
from cpt_jax.vocab.init_rows import InitRows, RowContext
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
    """Writes the extended tokenizer into `out`, and its figures into `report`; or refuses it, and leaves nothing.

    Args:
      new: training text of the new domains; old: of the domains whose tokenisation is to stay.
      heldout: held-out texts by domain, for the figures.
    """
    pending = out.with_name(out.name + ".unchecked")
    shutil.rmtree(pending, ignore_errors=True)
    done = extend(base, vocabulary.extension, new(), old(), pending, drop_unreachable=vocabulary.drop_unreachable)
    before, after = Tokenizer(base), Tokenizer(pending)
    corpora = [compare(name, before, after, texts) for name, texts in heldout.items()]
    use = piece_use(before, after, new())
    try:
        check(before, after, heldout, corpora, old_names, use, vocabulary.limits)
    except UserError:
        shutil.rmtree(pending)
        raise
    pending.replace(out)
    figures = {"corpora": corpora, **dataclasses.asdict(use), **dataclasses.asdict(done)}
    if report is not None:
        write_json_atomic(report, figures)
    return figures


def grow_model(
    model: Path, tokenizer: Path, initial_rows: InitRows, seed: int, out: Path, texts: Texts = lambda: ()
) -> None:
    """Writes the model with a row for every piece of the extended tokenizer; the old rows are bit-identical.

    Args:
      texts: training text of the new domain, for rows that are made from it.

    Raises:
      UserError: the tokenizers do not fit the model, or each other.
    """
    config, weights, hf_config = load(model)
    base, extended = Tokenizer(model), Tokenizer(tokenizer)
    if extended.size < base.size:
        raise UserError(
            f"the tokenizer in {tokenizer} has {extended.size:,} pieces, fewer than the model's {base.size:,}"
        )
    flat = flatten(weights)
    tables = {name: flat[f"{name}/base"] for name in ("embed", "head") if f"{name}/base" in flat}
    if config.vocab_size > base.size:
        say(
            f"model: {config.vocab_size - base.size:,} rows of the embedding belong to no piece of the tokenizer: new pieces take their places"
        )
    elif config.vocab_size < base.size:
        say(
            f"model: the tokenizer has {base.size - config.vocab_size:,} pieces more than the embedding has rows: they start as its mean"
        )
    kept = {name: _fitted(table, base.size) for name, table in tables.items()}
    config = dataclasses.replace(config, vocab_size=base.size)

    def frozen() -> FrozenModel:
        plain = Model(config=config, weights=unflatten(flat | {f"{n}/base": t for n, t in kept.items()}), hf_config={})
        precision = Precision(compute="bfloat16")
        return FrozenModel(config, plain.on_device(precision), precision.dtype)

    context = RowContext(
        pieces=old_segmentation(base, extended), base=base, extended=extended, texts=texts, model=frozen, seed=seed
    )
    new = {}
    if context.pieces:
        new = initial_rows.build({name: np.asarray(table, np.float32) for name, table in kept.items()}, context)
    for name, table in kept.items():
        flat[f"{name}/base"] = table
        if name in new:
            flat[f"{name}/new"] = new[name].astype(table.dtype)
    grown = dataclasses.replace(config, new_rows=len(context.pieces))
    save(out, grown, unflatten(flat), hf_config, tokenizer, dtype=flat["embed/base"].dtype)


def _fitted(table: np.ndarray, rows: int) -> np.ndarray:
    """The first `rows` rows; those that the table lacks are its mean."""
    if table.shape[0] >= rows:
        return table[:rows]
    mean = np.asarray(table, np.float64).mean(0).astype(table.dtype)
    return np.concatenate([table, np.tile(mean, (rows - table.shape[0], 1))])
