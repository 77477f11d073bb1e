"""`cpt tokenizer extend` and `cpt tokenizer report`."""

import dataclasses
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpt_jax.checkpoint.hf import read_config
from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import number_of, progress, say
from cpt_jax.core.stores import Location, is_address, refuse_existing, write_json, written_beside, written_to
from cpt_jax.core.tree import flatten
from cpt_jax.data.holdout import HeldApart, Holdout
from cpt_jax.data.sources import Corpus, SkipCounts, corpora_of, read, texts_of
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.models.families import family_for
from cpt_jax.models.vocab_table import BASE_ROWS
from cpt_jax.recipe.find import find_tokenizer
from cpt_jax.recipe.grow import grow_tokenizer
from cpt_jax.recipe.recipe import Vocabulary
from cpt_jax.report.tokenizer_curve import curve_text, write_curve_picture
from cpt_jax.report.tokenizer_report import report_text, write_page
from cpt_jax.vocab.extend import TOKENIZER_PREFIXES, ContinuedBPE, Extension, Union
from cpt_jax.vocab.fertility import ModelSizes, compare, curve, speed
from cpt_jax.vocab.gate import Limits, moved_ids, piece_use, slow_fast_differences
from cpt_jax.vocab.segmentation import kind_of
from cpt_jax.vocab.selection import sampled
from cpt_jax.vocab.tokenizer import Tokenizer

# Text that figures are measured on: of each corpus when extending, of each when comparing, and for speed.
MEASURED_BYTES, COMPARED_BYTES, SPEED_BYTES = 2_000_000, 20_000_000, 2_000_000


def extension_of(
    *, method: str, new_tokens: int, scores: str | None = None, candidates: Path | None = None,
    ban: Path | None = None, scripts: Sequence[str] = (), **limits: float | None,
) -> Extension:  # fmt: skip
    """The extension that the flags ask for; a limit that is None keeps its default.

    Raises:
      UserError: a value is wrong, or a flag does not go with the method.
    """
    selection: dict[str, Any] = {
        "new_tokens": new_tokens,
        "candidates": _terms(candidates),
        "banned": _terms(ban),
        "scripts": tuple(scripts),
        **{name: value for name, value in limits.items() if value is not None},
    }
    if scores is not None:
        selection["scores"] = scores
    if method == "union":
        return Union(**selection)
    if scores is not None:
        raise UserError(f"--scores {scores} goes with --method union: continued-bpe needs no scores")
    return ContinuedBPE(**selection)


def _terms(path: Path | None) -> tuple[str, ...]:
    """A file's lines, without empty ones and repetitions."""
    if path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: save it as UTF-8, one term a line") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a file with one term a line") from error
    if terms := tuple(dict.fromkeys(line.strip() for line in lines if line.strip())):
        return terms
    raise UserError(f"{path} holds no term: write one a line")


def _sample(corpus: Corpus, max_bytes: int) -> list[str]:
    """Whole documents, chosen by hash where there are more than `max_bytes`; what was left out is told."""
    skipped = SkipCounts()
    texts, size, total = sampled((document.text for document in read(corpus, skipped)), max_bytes)
    of_all = f" of {total:,}" if size < total else ""
    left_out = "".join(f"; left out: {count:,} x {reason}" for reason, count in skipped.items())
    say(f"{corpus.name}: {number_of(len(texts), 'document')}, {size:,}{of_all} bytes{left_out}")
    return texts


def _holdout(share: float) -> Holdout:
    return Holdout(share=share, max_bytes=MEASURED_BYTES, max_document_bytes=MEASURED_BYTES // 10)


# Extend


def tokenizer_extend(
    *, base: str, corpora: Sequence[str], protect: Sequence[str], extension: Extension, drop_unreachable: bool,
    limits: Limits, heldout_share: float, text_field: str, out: Location, json_path: Location | None,
) -> None:  # fmt: skip
    """`cpt tokenizer extend`: writes nothing unless the gate lets the result pass."""
    source = find_tokenizer(base)
    if is_address(out):
        refuse_existing(out)
    else:
        _check_out(Path(out), source)
    kind_of(Tokenizer(source))
    named = corpora_of([*corpora, *protect], text_field)
    new, old = named[: len(corpora)], named[len(corpora) :]
    with tempfile.TemporaryDirectory() as place, written_to(out) as local:
        measured = {corpus.name: _sample(corpus, MEASURED_BYTES) for corpus in new}
        kept = {corpus.name: HeldApart(corpus, _holdout(heldout_share), Path(place)) for corpus in old}
        measured |= {name: parts.measured() for name, parts in kept.items()}
        say(f"tokenizer: learning {number_of(extension.new_tokens, 'new piece')}")
        figures = grow_tokenizer(
            source,
            Vocabulary(extension=extension, drop_unreachable=drop_unreachable, limits=limits),
            lambda: texts_of(new),
            lambda: itertools.chain.from_iterable(parts.learnt() for parts in kept.values()),
            measured,
            list(kept),
            local,
            None,
        )
    for row in figures["corpora"]:
        row["held_out"] = row["name"] in kept
    print(report_text(figures))
    print(f"learnt from {figures['learnt_bytes']:,} of {figures['corpus_bytes']:,} bytes; written: {out}")
    if json_path is not None:
        write_json(json_path, figures)


def _check_out(out: Path, base: Path) -> None:
    """Nothing but an earlier tokenizer may be replaced."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a directory")
    if out.exists() and out.resolve() == base.resolve():
        raise UserError(f"--out {out} is the base itself: give another directory")
    for path in out.iterdir() if out.exists() else ():
        if not path.name.startswith(TOKENIZER_PREFIXES):
            raise UserError(f"--out {out} holds {path.name}, which is no tokenizer's file: give another directory")


# Report


def tokenizer_report(
    *, base: str, tokenizer: str | None, corpora: Sequence[str], protect: Sequence[str], extension: Extension | None,
    sizes: Sequence[int], sample_bytes: int | None, heldout_share: float, text_field: str, json_path: Location | None,
    html_path: Location | None, picture_path: Location | None,
) -> None:  # fmt: skip
    """`cpt tokenizer report`: two tokenizers compared, and with an `extension` how far each number of pieces would
    take the base."""
    if tokenizer is None and extension is None:
        raise UserError("nothing to report on: give --tokenizer DIR, or --curve to see what extending would bring")
    if picture_path is not None and extension is None:
        raise UserError("--plot is the picture of the curve: give --curve with it")
    if extension is not None and min(sizes) < 1:
        raise UserError(f"--sizes holds {min(sizes)}: give numbers of new pieces of at least 1")
    before = Tokenizer(find_tokenizer(base))
    after = None if tokenizer is None else Tokenizer(find_tokenizer(tokenizer))
    named = corpora_of([*corpora, *protect], text_field)
    figures: dict = {"base_tokenizer": base, "corpora": []}
    texts: dict[str, list[str]] = {}
    if after is not None:
        texts = {corpus.name: _sample(corpus, sample_bytes or COMPARED_BYTES) for corpus in named}
        figures |= {"tokenizer": tokenizer, **compared(before, after, texts)}
        print(report_text(figures))
    if extension is not None:
        new, old = named[: len(corpora)], named[len(corpora) :]
        figures["curve"] = measured_curve(before, extension, new, old, sizes, heldout_share)
        print(curve_text(figures["curve"]))
    if json_path is not None:
        write_json(json_path, figures)
    if picture_path is not None:
        with written_beside(picture_path) as path:
            write_curve_picture(figures["curve"], path)
    if html_path is not None:
        with written_beside(html_path) as path:
            write_page(path, figures, before, after, texts)
        print(f"page: {html_path}")


def compared(base: Tokenizer, extended: Tokenizer, texts: dict[str, list[str]]) -> dict:
    """All figures of two tokenizers. Where the ids of the base are not kept, there are no "new" pieces: None."""
    rows = []
    with progress("compare", len(texts) + 2, "parts") as shown:
        for name, documents in texts.items():
            row = compare(name, base, extended, documents)
            row["bytes"] = sum(len(text.encode()) for text in documents)
            row["slow_fast_differences"] = {
                side: None if one.sentencepiece is None else slow_fast_differences(one, documents)
                for side, one in (("base", base), ("extended", extended))
            }
            rows.append(row)
            shown.advance()
        moved = len(moved_ids(base, extended))
        use: dict = {"new_pieces": None, "unreachable_pieces": None}
        if not moved:
            use = dataclasses.asdict(piece_use(base, extended, itertools.chain.from_iterable(texts.values())))
        shown.advance()
        rates = _speeds(base, extended, texts)
        shown.advance()
    return {
        "corpora": rows,
        "vocabulary": {"base": base.size, "extended": extended.size},
        "moved_ids": moved,
        **use,
        "speed": rates,
    }


def _speeds(base: Tokenizer, extended: Tokenizer, texts: dict[str, list[str]]) -> dict:
    """Megabytes a second, the two taking turns, so that what else the machine does strikes both."""
    sample, _, _ = sampled(itertools.chain.from_iterable(texts.values()), SPEED_BYTES)
    best: dict = {"base": {}, "extended": {}}
    for _ in range(3):
        for side, tokenizer in (("base", base), ("extended", extended)):
            for name, value in speed(tokenizer, sample).items():
                best[side][name] = max(value, best[side].get(name, 0.0))
    ratios = {f"{name}_ratio": best["extended"][name] / best["base"][name] for name in ("encode", "decode")}
    return best | ratios


# The curve


def measured_curve(
    base: Tokenizer,
    extension: Extension,
    new: Sequence[Corpus],
    old: Sequence[Corpus],
    sizes: Sequence[int],
    heldout_share: float,
) -> dict:
    """`fertility.curve` of the corpora, each without its held-out part, on which fertility is measured."""
    with tempfile.TemporaryDirectory() as place:
        holdout = _holdout(heldout_share)
        parts = [HeldApart(corpus, holdout, Path(place)) for corpus in new]
        kept = [HeldApart(corpus, holdout, Path(place)) for corpus in old]
        texts, learnt, total = sampled(
            itertools.chain.from_iterable(part.learnt() for part in parts), extension.sample_bytes
        )
        heldout = [text for part in parts for text in part.measured()]
        say(f"curve: learning up to {max(sizes):,} new pieces from {learnt:,} of {total:,} bytes")
        protected = itertools.chain.from_iterable(part.learnt() for part in kept)
        found = curve(base, extension, texts, protected, heldout, sizes, model_sizes(base.directory))
    return found | {
        "corpora": [corpus.name for corpus in new],
        "method": "union" if isinstance(extension, Union) else "continued-bpe",
        "learnt_bytes": learnt,
        "heldout_bytes": sum(len(text.encode()) for text in heldout),
    }


def model_sizes(directory: Path) -> ModelSizes | None:
    """What a row costs in the model that a tokenizer stands beside; None where there is no model of a known family."""
    if not (directory / "config.json").exists():
        say(f"curve: {directory} has no config.json: what a piece costs in the model is left out")
        return None
    try:
        hf_config = read_config(directory)
        config = family_for(hf_config).config_from_hf(hf_config)
    except UserError as error:
        say(f"curve: what a piece costs in the model is left out ({error})")
        return None
    shapes = flatten(abstract_decoder(config).shapes)
    tables = [path for path in shapes if path in BASE_ROWS]
    other = sum(leaf.size for path, leaf in shapes.items() if path not in tables)
    row = sum(shapes[path].shape[1] for path in tables)
    return ModelSizes(width=config.hidden_size, row=row, other_parameters=other)
