"""`cpt data prepare` and `cpt data stats`."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import write_json_atomic, write_text_atomic
from cpt_jax.core.stores import Location, is_address
from cpt_jax.data.cleaning import Cleaning
from cpt_jax.data.pipeline import prepare_corpus
from cpt_jax.data.prepare import STATISTICS, Manifest, read_manifest
from cpt_jax.data.sources import named_corpora
from cpt_jax.data.steps import Task
from cpt_jax.recipe.data_page import data_page, figures_of, summary


def prepare_data(
    *,
    tokenizer: Path,
    inputs: Sequence[tuple[str, str]],
    text_field: str,
    chat: Sequence[str],
    chat_template: Path | None,
    cleaning: Cleaning,
    workers: int | None,
    runner: str,
    runner_options: Sequence[str],
    out: Location,
) -> None:
    """`cpt data prepare`: each corpus into a directory of its name below `out`.

    Raises:
      UserError: options of Beam without a runner of Beam, or whatever is wrong with the corpora.
    """
    if runner == "local" and runner_options:
        raise UserError("--runner-options are Beam's: give --runner DirectRunner, dataflow, flink or spark too")
    for corpus in named_corpora(inputs, text_field, chat):
        place = f"{out}/{corpus.name}" if is_address(out) else Path(out) / corpus.name
        task = Task(corpus=corpus, place=place, tokenizer=tokenizer, template=chat_template, cleaning=cleaning)
        if runner == "local":
            manifest = prepare_corpus(task, workers)
        else:
            from cpt_jax.data.beam import prepare_with_beam

            manifest = prepare_with_beam(task, runner, runner_options, workers)
        left_out = ", ".join(f"{count:,} x {reason}" for reason, count in manifest.skipped.items()) or "none"
        learnt = f" ({manifest.trained_tokens:,} of them learnt)" if corpus.format == "chat" else ""
        print(
            f"{place}: {manifest.records:,} documents, {manifest.bytes:,} bytes, {manifest.tokens:,} tokens{learnt}; left out: {left_out}"
        )


def show_data(
    *,
    given: Sequence[str],
    text_field: str,
    chat: Sequence[str],
    cleaning: Cleaning,
    workers: int | None,
    html_path: Path | None,
    json_path: Path | None,
) -> None:
    """`cpt data stats`: prepared directories as they were prepared; corpora as they would be with this cleaning.

    Raises:
      UserError: something is neither, or nothing in it is usable.
    """
    directories = [each for each in given if (Path(each) / "manifest.json").exists()]
    others = [each for each in given if each not in directories]
    if wrong := [each for each in others if "=" not in each]:
        raise UserError(f"{wrong[0]!r} is no prepared directory and no NAME=SPEC, as in zh=law.jsonl")
    specs = [(name, spec) for name, _, spec in (each.partition("=") for each in others)]
    found = [_described(Path(each), read_manifest(Path(each))) for each in directories]
    with tempfile.TemporaryDirectory(prefix="cpt-") as root:
        for corpus in named_corpora(specs, text_field, chat):
            place = Path(root) / corpus.name
            task = Task(corpus=corpus, place=place, tokenizer=None, cleaning=cleaning)
            found.append(_described(place, prepare_corpus(task, workers)))
    for figures in found:
        print(summary(figures))
    if json_path is not None:
        write_json_atomic(json_path, {"corpora": found})
    if html_path is not None:
        write_text_atomic(html_path, data_page(found))
        print(html_path)


def _described(directory: Path, manifest: Manifest) -> dict:
    return figures_of(manifest, json.loads((directory / STATISTICS).read_text(encoding="utf-8")))
