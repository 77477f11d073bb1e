"""`cpt data prepare` and `cpt data stats`."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cpt_jax.core.errors import UserError
from cpt_jax.core.place import Place
from cpt_jax.core.storage import write_text_atomic
from cpt_jax.core.stores import Location, is_address, location, read_from, write_json, written_beside
from cpt_jax.data.cleaning import Cleaning
from cpt_jax.data.pipeline import prepare_corpus
from cpt_jax.data.prepare import MANIFEST, STATISTICS, Manifest, read_manifest
from cpt_jax.data.sources import named_corpora
from cpt_jax.data.steps import Task
from cpt_jax.recipe.find import find_tokenizer
from cpt_jax.report.data_page import data_page, figures_of, summary


def prepare_data(
    *,
    tokenizer: str,
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
    directory = find_tokenizer(tokenizer)
    for corpus in named_corpora(inputs, text_field, chat):
        place = f"{out}/{corpus.name}" if is_address(out) else Path(out) / corpus.name
        task = Task(corpus=corpus, place=place, tokenizer=directory, template=chat_template, cleaning=cleaning)
        if runner == "local":
            manifest = prepare_corpus(task, workers)
        else:
            from cpt_jax.data.beam import prepare_with_beam

            manifest = prepare_with_beam(task, runner, runner_options, workers)
        print(f"{place}: {manifest.told()}")


def show_data(
    *,
    given: Sequence[str],
    text_field: str,
    chat: Sequence[str],
    cleaning: Cleaning,
    workers: int | None,
    html_path: Location | None,
    json_path: Location | None,
) -> None:
    """`cpt data stats`: prepared directories as they were prepared; corpora as they would be with this cleaning.

    Raises:
      UserError: something is neither, or nothing in it is usable.
    """
    directories = [each for each in given if _is_prepared(each)]
    others = [each for each in given if each not in directories]
    if wrong := [each for each in others if "=" not in each]:
        raise UserError(f"{wrong[0]!r} is no prepared directory and no NAME=SPEC, as in zh=law.jsonl")
    specs = [(name, spec) for name, _, spec in (each.partition("=") for each in others)]
    found = []
    for each in directories:
        with read_from(location(each), (MANIFEST, STATISTICS).__contains__) as path:
            found.append(_described(path, read_manifest(path)))
    with tempfile.TemporaryDirectory(prefix="cpt-") as root:
        for corpus in named_corpora(specs, text_field, chat):
            place = Path(root) / corpus.name
            task = Task(corpus=corpus, place=place, tokenizer=None, cleaning=cleaning)
            found.append(_described(place, prepare_corpus(task, workers)))
    for figures in found:
        print(summary(figures))
    if json_path is not None:
        write_json(json_path, {"corpora": found})
    if html_path is not None:
        with written_beside(html_path) as path:
            write_text_atomic(path, data_page(found))
        print(html_path)


def _is_prepared(given: str) -> bool:
    """Whether it is a directory, or an address of one, and no NAME=SPEC."""
    if "=" in given.partition("://")[0] and is_address(given):
        return False
    return Place(location(given)).read(MANIFEST) is not None


def _described(directory: Path, manifest: Manifest) -> dict:
    return figures_of(manifest, json.loads((directory / STATISTICS).read_text(encoding="utf-8")))
