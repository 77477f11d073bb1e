"""The pipeline: every station of a recipe, in order, each skipped when it is done."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from cpt_jax.core import processes
from cpt_jax.core.config import to_json
from cpt_jax.core.errors import UserError
from cpt_jax.core.place import Place
from cpt_jax.core.progress import Plan, quiet_libraries, say
from cpt_jax.core.storage import write_text_atomic
from cpt_jax.core.stores import Location, refuse_existing, written_to
from cpt_jax.data.chat_template import written_by
from cpt_jax.data.cleaning import MeasuredApart, evaluation_state
from cpt_jax.data.holdout import read_heldout, write_heldout
from cpt_jax.data.mixture import domains_of
from cpt_jax.data.pipeline import prepare_corpus
from cpt_jax.data.prepare import MANIFEST, STATISTICS
from cpt_jax.data.records import Unreadable
from cpt_jax.data.sources import corpus_state, files_of
from cpt_jax.data.steps import Task
from cpt_jax.data.tfds_format import DATASET_INFO, FEATURES
from cpt_jax.recipe.find import saved_recipe
from cpt_jax.recipe.recipe import Domain, Recipe, Stage
from cpt_jax.recipe.shared import SharedStations
from cpt_jax.recipe.stages import Stages
from cpt_jax.recipe.stations import Workdir
from cpt_jax.recipe.vocabulary_stations import VocabularyStations
from cpt_jax.report.run_report import domain_table, evaluations_in
from cpt_jax.sharding.mesh import MeshShape
from cpt_jax.training.guard import HANG_SECONDS, ends_when_asked
from cpt_jax.training.profile import ProfiledSteps
from cpt_jax.training.trackers import TrackerName, Tracking


def run(
    recipe: Recipe,
    workdir: Location,
    *,
    update: bool = False,
    only: str | None = None,
    profiled: ProfiledSteps | None = None,
    mesh: MeshShape | None = None,
    hang_seconds: float | None = HANG_SECONDS,
    unreadable: Unreadable = "stop",
    shared: SharedStations | None = None,
    track: Sequence[TrackerName] = (),
) -> None:
    """Runs a recipe in `workdir`, a directory or an address in a store; called again, it continues where it stopped. Ends with the domain table and the
    report's path.

    `only="train"` ends after the last stage's evaluation, without export, samples and report. `profiled` steps of
    each stage are traced into its directory. `mesh`: how it lies on the devices, which may be another each time.
    `hang_seconds`: of a watchdog over training. `unreadable`: what becomes of data that cannot be read. `shared`: where
    the runs of a sweep have in common what they have in common. `track`: where the figures of training go besides.

    Raises:
      Preempted: it was asked to end by SIGTERM; all that was done is kept.
      UserError: wrong input, told before anything is computed as far as it can be.
    """
    quiet_libraries()
    for domain in recipe.domains:
        files_of(domain.corpus)
    with ends_when_asked(), Workdir(workdir, recipe, update=update, shared=shared) as claimed:
        pipeline = Pipeline(recipe, claimed)
        pipeline.profiled, pipeline.mesh = profiled, mesh
        pipeline.hang_seconds, pipeline.unreadable = hang_seconds, unreadable
        pipeline.tracking = Tracking(kinds=tuple(track), run=recipe.name, directory=claimed.path)
        pipeline.run(only)
    if not processes.is_first():
        return
    entries = evaluations_in((claimed.path / "eval.json").read_text())
    print(domain_table(entries, [domain.name for domain in recipe.domains]))
    if only is None:
        print(f"\nmodel:  {workdir}/export\nreport: {workdir}/report.html")


def claim(recipe: Recipe, workdir: Location, *, update: bool = False, mesh: MeshShape | None = None) -> None:
    """Writes a recipe into its work directory and says what can be done with it.

    Raises:
      UserError: the directory is not free for it, or its base, or the devices, do not go with it.
    """
    with Workdir(workdir, recipe, update=update) as claimed:
        pipeline = Pipeline(recipe, claimed)
        pipeline.mesh = mesh
        pipeline.resolve()
    config = f"{workdir}/config.json"
    if processes.is_first():
        print(f"{config}: nothing was run yet")
        print(f"run it:              cpt run {config} --workdir {workdir}")
        print(f"values side by side: cpt sweep {config} --vary FIELD VALUE VALUE")


class Pipeline(VocabularyStations, Stages):
    """The stations of one run, in order. Each method makes sure that its station is done."""

    def run(self, only: str | None) -> None:
        self.until_training(only)
        for index, stage in enumerate(self.recipe.stages):
            self.train(index, stage)
            self.evaluate_stage(stage)
        self.finish(only)

    def until_training(self, only: str | None) -> None:
        """All stations before the first stage."""
        self.resolve()
        for domain in self.recipe.domains:
            self.hold_out(domain)
        self.plan = self._plan(only)
        self.evaluate("base", "last")
        for stage in self.recipe.stages:
            self.measure_base(stage)
        self.vocabulary()
        if only is None and self.recipe.export.adapter:
            self.check_adapter()
        if self.recipe.changes_base:
            self.evaluate("extended", "last")
        for name in {name: None for stage in self.recipe.stages for name in domains_of(stage.mixture)}:
            self.prepare(next(domain for domain in self.recipe.domains if domain.name == name))

    def evaluate_stage(self, stage: Stage) -> None:
        for weights in ("last", "ema") if stage.ema is not None else ("last",):
            self.evaluate(stage.name, weights)

    def finish(self, only: str | None) -> None:
        """The stations behind the last stage's evaluation."""
        if only is None:
            self.export()
            self.samples()
            self.report()

    def hold_out(self, domain: Domain) -> None:
        out = self._data(domain)
        # What is left out of training does not change what is held out.
        given = {field: value for field, value in to_json(domain).items() if field != "cleaning"}
        self._station(
            f"hold-out-{domain.name}",
            [given, corpus_state(domain.corpus)],
            [out / "heldout.jsonl", out / "heldout_hashes.bin"],
            lambda: write_heldout(domain.corpus, domain.heldout, out),
            common=True,
        )

    def prepare(self, domain: Domain) -> None:
        out = self._data(domain)

        others = [each for each in self.recipe.domains if domain.cleaning.evaluation_words is not None]
        task = Task(
            corpus=domain.corpus,
            place=out,
            tokenizer=self.path / "tokenizer",
            template=self.template_file,
            cleaning=domain.cleaning,
            apart=MeasuredApart(holdout=domain.heldout, directory=out),
            measured=tuple((each.name, self._data(each)) for each in others),
        )

        def tokenise() -> None:
            say(f"data: tokenising {domain.name}")
            say(f"data: {domain.name}: {prepare_corpus(task).told()}")

        heldout = [self.marks[f"hold-out-{each.name}"] for each in others]
        cleaning = [to_json(domain.cleaning), heldout, evaluation_state(domain.cleaning)]
        written = written_by(self.tokenizer, self.template_file) if domain.corpus.format == "chat" else None
        inputs = [self.marks[f"hold-out-{domain.name}"], self.tokenizer.fingerprint, written, cleaning]
        outputs = [out / name for name in (MANIFEST, STATISTICS, DATASET_INFO, FEATURES)]
        self._station(f"data-{domain.name}", inputs, outputs, tokenise, beside="train-*.arrayrecord", common=True)

    def _plan(self, only: str | None) -> Plan:
        """Work in training tokens: an evaluated token costs half of one; the rest is given in seconds for a rate of
        4 FLOPs a parameter."""
        rate = 4 * self.parameters / (2e11 if jax.default_backend() == "cpu" else 2e14)
        documents = {domain.name: read_heldout(self._data(domain)) for domain in self.recipe.domains}
        before = sum(len(ids) for texts in documents.values() for ids in self.base_tokenizer.encode_documents(texts))
        grows = self.recipe.vocabulary is not None
        after = before * 0.6 if grows else before
        work = {"evaluate-base-last": before / 2}
        if grows:
            work |= {"tokenizer": 25 / rate, "base-model": 3 / rate}
        if self.recipe.changes_base:
            work["evaluate-extended-last"] = after / 2
        for name in {name for stage in self.recipe.stages for name in domains_of(stage.mixture)}:
            work[f"data-{name}"] = 5 / rate
        for stage in self.recipe.stages:
            work[f"stage-{stage.name}"] = stage.steps * stage.batch_size * stage.sequence_length + 15 / rate
            for weights in ("last", "ema") if stage.ema is not None else ("last",):
                work[f"evaluate-{stage.name}-{weights}"] = after / 2
        if only is None:
            work |= {"export": 10 / rate, "samples": 20 / rate}
        return Plan(work, rate)


def export_run(run_directory: Location, out: Location, changes: dict[str, Any]) -> None:
    """Exports a finished run's result elsewhere, otherwise than its recipe says in what `changes` of its `Export`.

    Raises:
      UserError: no run, not finished, no such weights, or there is something at `out`.
    """
    quiet_libraries()
    refuse_existing(out)
    if (config := Place(run_directory).read("config.json")) is None:
        raise UserError(f"{run_directory} is no run's directory (no config.json)")
    recipe = saved_recipe(config.decode(), f"{run_directory}/config.json")
    export = dataclasses.replace(recipe.export, **changes)
    recipe.check_export(export)
    with written_to(out) as local, Workdir(run_directory, recipe) as claimed:
        claimed.fetch_done()
        for stage in recipe.stages:
            if not claimed.is_done(f"stage-{stage.name}"):
                raise UserError(
                    f"stage {stage.name!r} of {run_directory} is not finished: run `cpt run {run_directory}/config.json --workdir {run_directory}` to its end first"
                )
        pipeline = Pipeline(recipe, claimed)
        pipeline.resolve()
        pipeline.check_base()
        pipeline.write_export(export, local)
        write_text_atomic(local / "README.md", pipeline.card(export))
    print(out)
