"""What comes of a run: evaluations, the export, samples, the report."""

import functools
import itertools
import json
from pathlib import Path

from cpt_jax.checkpoint.hf import read_config
from cpt_jax.checkpoint.hub import is_hub_id
from cpt_jax.checkpoint.peft import held_by_adapter
from cpt_jax.core import processes
from cpt_jax.core.config import to_json
from cpt_jax.core.progress import clock, progress, say
from cpt_jax.core.storage import write_json_atomic, write_text_atomic
from cpt_jax.core.tree import flatten
from cpt_jax.data.holdout import heldout_documents, read_heldout
from cpt_jax.data.prepare import read_manifest
from cpt_jax.evaluate.bits_per_byte import PackedDocuments, bits_per_byte, pack_conversations, pack_documents
from cpt_jax.models.families.composite import auto_class
from cpt_jax.recipe.card import model_card
from cpt_jax.recipe.context import RunContext
from cpt_jax.recipe.export import export_adapter, export_model, sample_page
from cpt_jax.recipe.model import Model
from cpt_jax.recipe.recipe import Domain, Export
from cpt_jax.report.run_report import evaluations_in, write_report
from cpt_jax.report.samples_page import Sample, samples_page
from cpt_jax.sharding.mesh import make_mesh
from cpt_jax.vocab.tokenizer import Tokenizer


class Results(RunContext):
    """The stations whose outputs are looked at."""

    def evaluate(self, stage_name: str, weights: str) -> None:
        """Bits per byte on every domain, into evaluations/ and eval.json."""
        name = f"evaluate-{stage_name}-{weights}"
        out = self.path / "evaluations" / f"{stage_name}-{weights}.json"
        stations = {"base": "base", "extended": "base-model", "export": "export"}
        trained = stations.get(stage_name, f"stage-{stage_name}")
        heldout = [self.marks[f"hold-out-{domain.name}"] for domain in self.recipe.domains]
        inputs = [to_json(self.recipe.evaluation), self.marks[trained], heldout, self.template_given()]
        if self.recipe.context is not None:
            inputs.append("by position")

        def build() -> None:
            entries = self._evaluated(stage_name, weights, name)
            if processes.is_first():
                write_json_atomic(out, entries)

        self._station(name, inputs, [out], build, together=True, common=stage_name in ("base", "extended"))
        if processes.is_first():
            self._collect()

    def _evaluated(self, stage_name: str, weights: str, name: str) -> list[dict]:
        settings = self.recipe.evaluation
        tokenizer = self.base_tokenizer if stage_name == "base" else self.tokenizer
        model = self.lineage.after(stage_name, weights)
        mesh = make_mesh(shape=self.mesh)
        on_mesh = model.on_mesh(settings.precision, mesh)
        length, by_position = self._length_for(model), self.recipe.context is not None
        packed = {
            domain.name: self._packed(domain, tokenizer, length, by_position=by_position)
            for domain in self.recipe.domains
        }
        entries = []
        with progress(name, sum(len(documents) for documents in packed.values()), "rows", self.plan) as shown:
            for domain, documents in packed.items():
                result = bits_per_byte(
                    model.network,
                    on_mesh,
                    documents,
                    batch_size=settings.batch_size,
                    mesh=mesh,
                    precision=settings.precision,
                    on_progress=shown.advance,
                )
                entries.append({"stage": stage_name, "weights": weights, "domain": domain, **result.figures()})
        return entries

    def _length_for(self, model: Model) -> int:
        """Tokens of a row of evaluation: a base whose context is made longer reads what it was made for."""
        return min(self.recipe.evaluation.sequence_length, model.config.context_length)

    def _packed(
        self,
        domain: Domain,
        tokenizer: Tokenizer,
        sequence_length: int,
        max_bytes: int | None = None,
        by_position: bool = False,
    ) -> PackedDocuments:
        """A domain's held-out documents; with `max_bytes` the first of them, the last one whole."""
        documents = heldout_documents(self._data(domain))
        if max_bytes is not None:
            before = [0, *itertools.accumulate(len(document.text.encode()) for document in documents)]
            documents = [document for document, size in zip(documents, before, strict=False) if size < max_bytes]
        if domain.corpus.format == "chat":
            return pack_conversations(self.chat_encoder(tokenizer), documents, sequence_length)
        return pack_documents(tokenizer, [document.text for document in documents], sequence_length, by_position)

    def _collect(self) -> None:
        """eval.json: what has been evaluated so far, in the run's order."""
        order = ["base", "extended", *(stage.name for stage in self.recipe.stages), "export"]
        files = [
            self.path / "evaluations" / f"{stage}-{weights}.json" for stage in order for weights in ("last", "ema")
        ]
        done = {f"evaluate-{file.stem}" for file in files if f"evaluate-{file.stem}" in self.marks}
        entries = [entry for file in files if f"evaluate-{file.stem}" in done for entry in json.loads(file.read_text())]
        write_json_atomic(self.path / "eval.json", entries)
        self.workdir.keep("eval.json")

    @property
    def _last_stage(self) -> str:
        return self.recipe.stages[-1].name if self.recipe.stages else "extended"

    def export(self) -> None:
        out, export, stage = self.path / "export", self.recipe.export, self._last_stage
        trained = self.marks.get(f"stage-{stage}", self.marks["base-model"])
        # The stages do not follow from the chat template where nothing they read is written by it.
        inputs = [to_json(export), trained, self.tokenizer.fingerprint, self.template_given()]
        # What leaves the house is none of the models evaluated so far, if the base is mixed into it.
        mixed = bool(export.interpolate_base)
        self._station("export", inputs, [out], lambda: self.write_export(export, out), everywhere=mixed)
        if mixed:
            self.evaluate("export", "last")
        # The card tells of more than the weights follow from: what else was evaluated, the data, the recipe's name.
        card = self.card(export) if processes.is_first() else ""
        file = out / "README.md"
        build = functools.partial(write_text_atomic, file, card)
        self._station("model-card", [card, self.marks["export"]], [file], build, everywhere=False)

    def check_adapter(self) -> None:
        """Raises a UserError where what will be trained cannot leave as an adapter: before it is trained."""
        model, trained = self.lineage.as_planned()
        held_by_adapter(model.config, model.hf_config, flatten(model.weights), trained, model.lora)

    def card(self, export: Export) -> str:
        """The model card of an export, by what has been evaluated so far."""
        manifests = {d.name: self._data(d) for d in self.recipe.domains if (self._data(d) / "manifest.json").exists()}
        tokens = {name: read_manifest(directory).tokens for name, directory in manifests.items()}
        entries = evaluations_in((self.path / "eval.json").read_text())
        if export != self.recipe.export:
            # What was evaluated as it left is another one.
            entries = [entry for entry in entries if entry["stage"] != "export"]
        released = self._released() if self.recipe.context is None else None
        return model_card(self.recipe, export, entries, tokens, released, auto_class(read_config(self.source)))

    def _released(self) -> str | None:
        """The hub id at which the base lies as a whole model, which an adapter is none."""
        base = self.recipe.base
        return base if is_hub_id(base) and not self.source.is_relative_to(self.path) else None

    def write_export(self, export: Export, out: Path) -> None:
        """The result, checked on a held-out text of each domain."""
        texts = [read_heldout(self._data(domain))[0] for domain in self.recipe.domains]
        model, tokenizer = self.lineage.after(self._last_stage, export.weights), self.path / "tokenizer"
        if export.adapter:
            base, paths = self.lineage.extended(), self.lineage.trained_paths()
            lies = None if self.recipe.changes_base else self._released()
            export_adapter(model, base, paths, lies or str((self.path / "base").resolve()), tokenizer, texts, out)
            return
        if export.interpolate_base:
            model = model.interpolated(self.lineage.after("extended", "last"), export.interpolate_base)
        export_model(model, tokenizer, texts, out, export, origin=self.source)

    def samples(self) -> None:
        out = self.path / "samples.md"
        settings = self.recipe.samples

        def write() -> None:
            say("samples: continuing the prompts")
            # An adapter is no model of its own.
            whole = not self.recipe.export.adapter
            result = self.lineage.after(
                "export" if whole else self._last_stage, "last" if whole else self.recipe.export.weights
            )
            after = sample_page(result, self.tokenizer, settings)
            before = sample_page(self.lineage.after("base", "last"), self.base_tokenizer, settings)
            write_text_atomic(out, samples_page(map(Sample, settings.prompts, before, after)))

        self._station("samples", [to_json(settings), self.marks["export"]], [out], write, everywhere=False)

    def report(self) -> None:
        if not processes.is_first():
            return
        write_json_atomic(self.path / "timings.json", self.workdir.seconds)
        write_report(self.path)
        self.workdir.keep("timings.json", "report.html", "plots")
        say(f"whole run: {clock(sum(self.workdir.seconds.values()))} of work")
