"""A corpus prepared on Apache Beam: the same steps over the same splits, by the workers of a runner. The shards are those
that this machine alone would write, byte for byte.

Workers read the corpus and write shards themselves: both have to be where all of them reach them (gs://, a shared disk).
The tokenizer's files go along with the work.
"""

import dataclasses
import functools
import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import say
from cpt_jax.data.pipeline import Step, cores, prepare_by
from cpt_jax.data.prepare import Manifest
from cpt_jax.data.splits import SPLIT_BYTES, Split, splits_of
from cpt_jax.data.steps import Task

# Beam's names of the runners.
_RUNNERS = {
    "DirectRunner": "DirectRunner",
    "dataflow": "DataflowRunner",
    "flink": "FlinkRunner",
    "spark": "SparkRunner",
}
# What a worker needs of a tokenizer's directory.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")

_TEMPLATE = "given.jinja"

Files = dict[str, bytes]


def prepare_with_beam(
    task: Task, runner: str, options: Sequence[str], workers: int | None, *, split_bytes: int = SPLIT_BYTES
) -> Manifest:
    """Prepares a corpus on a runner of Beam, with its own `options`. `workers`: processes of DirectRunner (default: one
    for each core); the others' are in their options.

    Raises:
      UserError: Beam is not installed, or whatever is wrong with the corpus.
    """
    try:
        import apache_beam as beam  # type: ignore[import-not-found]
        from apache_beam.options.pipeline_options import PipelineOptions  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise UserError(f"--runner {runner} needs Apache Beam: pip install apache-beam, or cpt_jax[beam]") from error
    given = [f"--runner={_RUNNERS[runner]}", *options]
    if runner == "DirectRunner":
        given += ["--direct_running_mode=multi_processing", f"--direct_num_workers={workers or cores()}"]
    files = {} if task.tokenizer is None else _packed(task.tokenizer)
    template = None if task.template is None else task.template.read_text(encoding="utf-8")

    def each(what: str, step: Step, task: Task, splits: Sequence[Split]) -> None:
        if not splits:
            return
        say(f"{what}: {len(splits)} splits on {_RUNNERS[runner]}")
        work = functools.partial(_do, step, task, files, template)
        with beam.Pipeline(options=PipelineOptions(given, save_main_session=False)) as pipeline:
            # Reshuffled: otherwise all splits are one worker's.
            splits_of_it = pipeline | "Splits" >> beam.Create(list(splits)) | beam.Reshuffle()
            _ = splits_of_it | step.__name__.capitalize() >> beam.Map(work)

    return prepare_by(task, splits_of(task.corpus, split_bytes), each)


def _packed(directory: Path) -> Files:
    return {name: (directory / name).read_bytes() for name in _TOKENIZER_FILES if (directory / name).is_file()}


def _do(step: Step, task: Task, files: Files, template: str | None, split: Split) -> int:
    """A step on a worker, which has its own copy of the tokenizer."""
    if task.tokenizer is not None:
        directory = _unpacked(files if template is None else files | {_TEMPLATE: template.encode()})
        task = dataclasses.replace(
            task, tokenizer=directory, template=None if template is None else directory / _TEMPLATE
        )
    step(task, split)
    return split.index


def _unpacked(files: Files) -> Path:
    """A directory of these files, made by the first of a machine's workers who needs it."""
    content = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    directory = Path(tempfile.gettempdir()) / f"cpt-tokenizer-{content}"
    if not directory.is_dir():
        own = Path(tempfile.mkdtemp(prefix="cpt-"))
        for name, file in files.items():
            (own / name).write_bytes(file)
        try:
            own.rename(directory)
        except OSError:
            # Another was faster.
            shutil.rmtree(own)
    return directory
