"""The pipeline: every station of a recipe, in order, each skipped when it is done."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from cpt_jax.core import processes
from cpt_jax.core.config import from_json, to_json
from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import Plan, quiet_libraries, say
from cpt_jax.core.storage import write_text_atomic
from cpt_jax.core.stores import Location, Store, is_address, written_to
from cpt_jax.data.cleaning import MeasuredApart, evaluation_state
from cpt_jax.data.holdout import read_heldout, training_documents, write_heldout
from cpt_jax.data.loader import Loader
from cpt_jax.data.pipeline import prepare_corpus
from cpt_jax.data.prepare import MANIFEST, STATISTICS, read_manifest
from cpt_jax.data.records import Unreadable
from cpt_jax.data.sources import SkipCounts, corpus_state, files_of
from cpt_jax.data.steps import Task
from cpt_jax.data.tfds_format import DATASET_INFO, FEATURES
from cpt_jax.recipe.copies import copy_tokenizer, link_directory
from cpt_jax.recipe.grow import grow_tokenizer
from cpt_jax.recipe.model import Model
from cpt_jax.recipe.recipe import Domain, Recipe, Stage
from cpt_jax.recipe.report import domain_table
from cpt_jax.recipe.results import Results
from cpt_jax.recipe.rows import grow_model
from cpt_jax.recipe.stations import Workdir
from cpt_jax.sharding.mesh import MeshShape
from cpt_jax.training.guard import HANG_SECONDS, ends_when_asked
from cpt_jax.training.loop import Training, train
from cpt_jax.training.profile import ProfiledSteps


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
) -> None:
    """Runs a recipe in `workdir`, a directory or an address in a store; called again, it continues where it stopped. Ends with the domain table and the
    report's path.

    `only="train"` ends after the last stage's evaluation, without export, samples and report. `profiled` steps of
    each stage are traced into its directory. `mesh`: how it lies on the devices, which may be another each time.
    `hang_seconds`: of a watchdog over training. `unreadable`: what becomes of data that cannot be read.

    Raises:
      Preempted: it was asked to end by SIGTERM; all that was done is kept.
      UserError: wrong input, told before anything is computed as far as it can be.
    """
    quiet_libraries()
    for domain in recipe.domains:
        files_of(domain.corpus)
    with ends_when_asked(), Workdir(workdir, recipe, update=update) as claimed:
        pipeline = Pipeline(recipe, claimed)
        pipeline.profiled, pipeline.mesh = profiled, mesh
        pipeline.hang_seconds, pipeline.unreadable = hang_seconds, unreadable
        pipeline.run(only)
    if not processes.is_first():
        return
    entries = json.loads((claimed.path / "eval.json").read_text())
    print(domain_table(entries, [domain.name for domain in recipe.domains]))
    if only is None:
        print(f"\nmodel:  {workdir}/export\nreport: {workdir}/report.html")


class Pipeline(Results):
    """The stations of one run, in order. Each method makes sure that its station is done."""

    def run(self, only: str | None) -> None:
        self.resolve()
        for domain in self.recipe.domains:
            self.hold_out(domain)
        self.plan = self._plan()
        self.evaluate("base", "last")
        self.vocabulary()
        if self.recipe.vocabulary is not None:
            self.evaluate("extended", "last")
        for name in {name: None for stage in self.recipe.stages for name in stage.mixture}:
            self.prepare(next(domain for domain in self.recipe.domains if domain.name == name))
        for index, stage in enumerate(self.recipe.stages):
            self.train(index, stage)
            for weights in ("last", "ema") if stage.ema is not None else ("last",):
                self.evaluate(stage.name, weights)
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
        )

    def _training_texts(self, role: str):
        for domain in self.recipe.domains:
            if domain.role == role:
                yield from training_documents(domain.corpus, domain.heldout, self._data(domain), SkipCounts())

    def vocabulary(self) -> None:
        """The tokenizer and the base model, grown if the recipe says so."""
        recipe, tokenizer, base = self.recipe, self.path / "tokenizer", self.path / "base"
        if recipe.vocabulary is None:
            inputs = ["unchanged", self.marks["base"]]

            def copy() -> None:
                copy_tokenizer(self.source, tokenizer)
                self._write_template(tokenizer)

            self._station("tokenizer", [*inputs, self.template_given()], [tokenizer], copy)
            self._station("base-model", inputs, [base], lambda: link_directory(self.source, base))
            return
        vocabulary = recipe.vocabulary
        roles = {domain.name: domain.role for domain in recipe.domains}
        upstream = [self.marks[f"hold-out-{name}"] for name in roles]

        def extend() -> None:
            say(f"tokenizer: learning {vocabulary.extension.new_tokens:,} new pieces")
            heldout = {domain.name: read_heldout(self._data(domain)) for domain in recipe.domains}
            grow_tokenizer(
                self.source,
                vocabulary,
                lambda: self._training_texts("new"),
                lambda: self._training_texts("replay"),
                heldout,
                recipe.named("replay"),
                tokenizer,
                self.path / "fertility.json",
            )
            self._write_template(tokenizer)

        outputs = [tokenizer, self.path / "fertility.json"]
        inputs = [to_json(vocabulary), self.marks["base"], upstream, self.template_given()]
        self._station("tokenizer", inputs, outputs, extend)
        self._station(
            "base-model",
            [to_json(vocabulary), self.marks["tokenizer"], recipe.seed],
            [base],
            lambda: grow_model(
                self.source, tokenizer, vocabulary.initial_rows, recipe.seed, base, lambda: self._training_texts("new")
            ),
        )

    def _write_template(self, tokenizer: Path) -> None:
        if (template := self.template_given()) is not None:
            write_text_atomic(tokenizer / "chat_template.jinja", template)

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
            prepare_corpus(task)

        heldout = [self.marks[f"hold-out-{each.name}"] for each in others]
        cleaning = [to_json(domain.cleaning), heldout, evaluation_state(domain.cleaning)]
        inputs = [self.marks[f"hold-out-{domain.name}"], self.tokenizer.fingerprint, self.template_given(), cleaning]
        outputs = [out / name for name in (MANIFEST, STATISTICS, DATASET_INFO, FEATURES)]
        self._station(f"data-{domain.name}", inputs, outputs, tokenise, beside="train-*.arrayrecord")

    # Training

    def train(self, index: int, stage: Stage) -> None:
        directory = self.lineage.directory(index, stage)
        names = [earlier.name for earlier in self.recipe.stages[:index]]
        upstream = self.marks[f"stage-{names[-1]}"] if names else self.marks["base-model"]
        data = [self.marks[f"data-{name}"] for name in stage.mixture]
        settings = to_json(stage)
        # How often it is saved, what of that stays, and what is computed twice, does not change what is computed.
        for field in ("checkpoint_seconds", "keep", "remat"):
            settings.pop(field)

        def build() -> None:
            seed = self.recipe.seed + index
            model = self.lineage.after(names[-1] if names else "extended", "last").adapted(stage.method, seed)
            model = model.for_training(jax.default_backend(), stage.remat, self.recipe.layer_loop)
            loader, length = self._loader(stage, seed), stage.sequence_length
            dtype, context = self.recipe.precision.dtype, self.mesh_of(stage).shape["context"]
            model = model.attending(self.recipe.attention, length, dtype, loader.documents, context)
            self.lineage.forget()
            trained = train(self._training(stage, model, loader, directory, seed), self.plan)
            self.lineage.remember(stage, trained)

        precision, padding = to_json(self.recipe.precision), self.recipe.pad_vocabulary_to
        inputs = [settings, precision, padding, self.recipe.seed + index, upstream, data]
        # Without its last checkpoint, which may have been damaged and removed, a stage is not done.
        outputs = [directory, directory / "checkpoints" / str(stage.steps)]
        self._station(f"stage-{stage.name}", inputs, outputs, build, together=True)

    def _loader(self, stage: Stage, seed: int) -> Loader:
        directories = {domain.name: self._data(domain) for domain in self.recipe.domains}
        for name, share in stage.mixture.items():
            tokens = read_manifest(directories[name]).tokens
            if (epochs := stage.steps * stage.batch_size * stage.sequence_length * share / tokens) > 4:
                say(f"stage {stage.name}: {name} will be read {epochs:.1f} times; more than 4 repetitions teach little")
        return Loader(
            stage.mixture,
            directories,
            sequence_length=stage.sequence_length,
            batch_size=stage.batch_size,
            start_id=self.tokenizer.start_id,
            end_id=self.tokenizer.end_id,
            tokenizer=self.tokenizer.fingerprint,
            seed=seed,
            packing=stage.packing,
            unreadable=self.unreadable,
        )

    def _training(self, stage: Stage, model: Model, loader: Loader, directory: Path, seed: int) -> Training:
        return Training(
            name=f"stage-{stage.name}",
            network=model.network,
            weights=model.weights,
            trains=stage.method.trains,
            loader=loader,
            optimizer=stage.optimizer,
            schedule=stage.schedule,
            ema=stage.ema,
            steps=stage.steps,
            accumulate=stage.accumulate,
            precision=self.recipe.precision,
            mesh=self.mesh_of(stage),
            directory=directory,
            checkpoint_seconds=stage.checkpoint_seconds,
            retention=stage.retention,
            z_loss=stage.z_loss,
            seed=seed,
            profiled=self.profiled,
            keep=stage.keep,
            hang_seconds=self.hang_seconds,
            journal=self.workdir.journal,
            stored=None if self.workdir.mirror is None else self.workdir.mirror.checkpoints(directory, stage.keep),
        )

    def _plan(self) -> Plan:
        """Work in training tokens: an evaluated token costs half of one; the rest is given in seconds for a rate of
        4 FLOPs a parameter."""
        rate = 4 * self.parameters / (2e11 if jax.default_backend() == "cpu" else 2e14)
        documents = {domain.name: read_heldout(self._data(domain)) for domain in self.recipe.domains}
        before = sum(len(ids) for texts in documents.values() for ids in self.base_tokenizer.encode_documents(texts))
        grows = self.recipe.vocabulary is not None
        after = before * 0.6 if grows else before
        work = {"evaluate-base-last": before / 2}
        if grows:
            work |= {"tokenizer": 25 / rate, "base-model": 3 / rate, "evaluate-extended-last": after / 2}
        for name in {name for stage in self.recipe.stages for name in stage.mixture}:
            work[f"data-{name}"] = 5 / rate
        for stage in self.recipe.stages:
            work[f"stage-{stage.name}"] = stage.steps * stage.batch_size * stage.sequence_length + 15 / rate
            for weights in ("last", "ema") if stage.ema is not None else ("last",):
                work[f"evaluate-{stage.name}-{weights}"] = after / 2
        return Plan(work | {"export": 10 / rate, "samples": 20 / rate}, rate)


def export_run(run_directory: Location, out: Location, changes: dict[str, Any]) -> None:
    """Exports a finished run's result elsewhere, otherwise than its recipe says in what `changes` of its `Export`.

    Raises:
      UserError: no run, not finished, no such weights, or there is something at `out`.
    """
    if Store(str(out)).names() if is_address(out) else Path(out).exists():
        raise UserError(f"{out} exists: give another --out, or remove it first")
    if is_address(run_directory):
        config = Store(str(run_directory)).read("config.json")
    else:
        path = Path(run_directory) / "config.json"
        config = path.read_bytes() if path.exists() else None
    if config is None:
        raise UserError(f"{run_directory} is no run's directory (no config.json)")
    recipe = from_json(Recipe, json.loads(config))
    export = dataclasses.replace(recipe.export, **changes)
    recipe.check_export(export)
    with Workdir(run_directory, recipe) as claimed, written_to(out) as local:
        claimed.fetch_done()
        pipeline = Pipeline(recipe, claimed)
        pipeline.resolve()
        pipeline.write_export(export, local)
    print(out)
