"""`cpt doctor`: whether what a run's directory holds is what was written, is all there, and agrees."""

import dataclasses
import fcntl
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from cpt_jax.checkpoint.base import resolve_base
from cpt_jax.checkpoint.hf import read_config
from cpt_jax.checkpoint.intact import fault, steps
from cpt_jax.checkpoint.peft.load import load_adapter
from cpt_jax.checkpoint.train_state import read_trained
from cpt_jax.core.checksums import difference
from cpt_jax.core.config import from_json
from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import number_of, quiet_libraries
from cpt_jax.core.storage import read_objects
from cpt_jax.core.stores import Location, write_json
from cpt_jax.core.tree import flatten
from cpt_jax.data.holdout import read_heldout
from cpt_jax.data.mixture import domains_of
from cpt_jax.data.prepare import MANIFEST, read_manifest
from cpt_jax.data.records import shard_fault
from cpt_jax.recipe.export import GATE, logit_difference, numpy_type
from cpt_jax.recipe.lineage import Lineage
from cpt_jax.recipe.mirror import examined
from cpt_jax.recipe.model import load_model
from cpt_jax.recipe.recipe import Recipe, Stage
from cpt_jax.report.many import is_sweep
from cpt_jax.report.run_report import evaluations_in
from cpt_jax.training.ending import ended_early
from cpt_jax.vocab.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found of a part of the run."""

    part: str
    good: bool
    says: str


def examine_run(run: Location, json_path: Location | None = None) -> bool:
    """Prints what is found of each part of a run, also of one in a store, and whether all of it is good.

    Raises:
      UserError: it is no run's directory, or a process is running in it.
    """
    quiet_libraries()
    if is_sweep(run):
        raise UserError(f"{run} is a sweep: examine its runs, one by one ({run}/runs/NAME)")
    findings = []
    with examined(run) as path:
        for found in Patient(path).findings():
            finding = dataclasses.replace(found, says=found.says.replace(str(path), str(run)))
            print(f"{'good ' if finding.good else 'WRONG'}  {finding.part}: {finding.says}", flush=True)
            findings.append(finding)
    wrong = [finding for finding in findings if not finding.good]
    print(f"wrong: {len(wrong)} of {number_of(len(findings), 'part')}" if wrong else "all is as it was written")
    if json_path is not None:
        write_json(json_path, {"good": not wrong, "findings": [dataclasses.asdict(f) for f in findings]})
    return not wrong


class Patient:
    """A run's directory under examination; nothing of the run is changed."""

    def __init__(self, run: Path) -> None:
        config = run / "config.json"
        if not config.exists() or "stages" not in read_config(run):
            raise UserError(f"{run} is no run's directory (no config.json of a recipe)")
        self.path = run
        self.recipe = from_json(Recipe, json.loads(config.read_text()))
        if (run / ".lock").exists():
            with (run / ".lock").open() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise UserError(f"a process is running in {run}: examine it when that has ended") from error

    def findings(self) -> Iterator[Finding]:
        yield self._found("run", self._stations)
        for name in {name: None for stage in self.recipe.stages for name in domains_of(stage.mixture)}:
            yield self._found(f"data/{name}", lambda name=name: self._data(name))
        for index, stage in enumerate(self.recipe.stages):
            directory = self.path / "stages" / f"{index + 1}-{stage.name}"
            if directory.exists():
                yield self._found(f"stages/{directory.name}", lambda stage=stage, at=directory: self._stage(stage, at))
        if (self.path / "eval.json").exists():
            yield self._found("eval.json", self._evaluations)
        if (self.path / "export").exists():
            yield self._found("export", self._export)

    def _found(self, part: str, look: Callable[[], str]) -> Finding:
        """What `look` says, or what it raises: a damaged part may fail anywhere in what reads it."""
        try:
            return Finding(part=part, good=True, says=look())
        except UserError as error:
            return Finding(part=part, good=False, says=str(error))
        except Exception as error:
            return Finding(part=part, good=False, says=f"cannot be read: {type(error).__name__}: {error}")

    def _done(self, station: str) -> bool:
        mark = self.path / ".stations" / f"{station}.json"
        return mark.exists() and json.loads(mark.read_text())["done"]

    def _stations(self) -> str:
        marks = {path.stem: json.loads(path.read_text()) for path in (self.path / ".stations").glob("*.json")}
        names = sorted(marks)
        for name in names:
            # Marks in a store have the SHA-256 of what the station wrote.
            if (wrong := difference(self.path, marks[name].get("files", {}))) is not None:
                raise UserError(f"{wrong}: run the recipe again, which does {name} anew")
        begun = [name for name in names if not self._done(name)]
        return f"done: {number_of(len(names) - len(begun), 'station')}" + (
            f"; not finished: {', '.join(begun)}" if begun else ""
        )

    def _data(self, name: str) -> str:
        directory = self.path / "data" / name
        if not (directory / MANIFEST).exists() and not self._done(f"data-{name}"):
            return "not prepared yet"
        manifest = read_manifest(directory)
        for shard in sorted(manifest.shards):
            if (wrong := shard_fault(directory, manifest, shard)) is not None:
                raise UserError(f"{wrong}: put it back, or remove {directory} to have it prepared again")
        expected = {shard: written.sha256 for shard, written in manifest.shards.items()}
        if (wrong := difference(directory, expected)) is not None:
            raise UserError(f"{wrong}: put it back, or remove {directory} to have it prepared again")
        return f"{number_of(manifest.records, 'document')} in {number_of(len(manifest.shards), 'shard')}"

    def _stage(self, stage: Stage, directory: Path) -> str:
        there = steps(directory / "checkpoints")
        wrong = {step: found for step in there if (found := fault(directory / "checkpoints" / str(step))) is not None}
        if wrong:
            told = "; ".join(f"checkpoint {step} is damaged ({found})" for step, found in wrong.items())
            raise UserError(f"{told}: remove it, and run the recipe again: it goes on from the one before")
        written = [line["step"] for line in read_objects(directory / "metrics.jsonl")]
        if written != list(range(1, len(written) + 1)):
            raise UserError(f"metrics.jsonl has {len(written)} lines that do not count the steps from 1")
        if not self._done(f"stage-{stage.name}"):
            newest = f", the newest of step {there[0]}" if there else ""
            return f"not finished; {number_of(len(there), 'checkpoint')}{newest}"
        last, why = ended_early(directory) or (stage.steps, "")
        if not there or there[0] != last:
            raise UserError(
                f"step {last}, its last, has no checkpoint: run the recipe again, it goes on from the one before"
            )
        if len(written) != last:
            raise UserError(f"metrics.jsonl has {len(written)} steps of {last}")
        leaves = flatten(read_trained(directory / "checkpoints")["last"])
        return f"{number_of(len(there), 'checkpoint')}; that of step {last} opens ({len(leaves)} weights)" + (
            f"; it ended there: {why}" if why else ""
        )

    def _evaluations(self) -> str:
        entries = evaluations_in((self.path / "eval.json").read_text())
        for entry in entries:
            if not math.isfinite(entry["bits_per_byte"]):
                raise UserError(f"{entry['stage']} on {entry['domain']} has {entry['bits_per_byte']} bits per byte")
        return f"{len(entries)} figures"

    def _export(self) -> str:
        """As when it was exported: its logits on a held-out text of each domain are the trained model's."""
        recipe, export = self.recipe, self.recipe.export
        source = resolve_base(recipe.base, self.path / "source")
        lineage = Lineage(recipe, self.path, source, Tokenizer(source).size)
        trained = lineage.after(recipe.stages[-1].name if recipe.stages else "extended", export.weights)
        if export.adapter:
            base = lineage.extended()
            adapter = load_adapter(self.path / "export", base.config, base.hf_config)
            written = dataclasses.replace(base, weights=adapter.over(base.config, base.weights), lora=adapter.lora)
            expected, written = trained.merged(), written.merged()
        else:
            if export.interpolate_base:
                trained = trained.interpolated(lineage.after("extended", "last"), export.interpolate_base)
            expected, written = trained.merged().rounded(numpy_type(export.dtype)), load_model(self.path / "export")
        texts = [read_heldout(self.path / "data" / domain.name)[0] for domain in recipe.domains]
        distance, tokens = logit_difference(expected, written, Tokenizer(self.path / "tokenizer"), texts)
        if not distance < GATE:
            raise UserError(
                f"its logits differ from the trained model's by {distance:.2g}: remove it, and run the recipe again"
            )
        return f"its logits on {tokens} tokens are the trained model's (difference {distance:.2g})"
