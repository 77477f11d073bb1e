"""The forgetting watch of a run: its sample of held-out documents, and what the base makes of them."""

import json
from pathlib import Path

from cpt_jax.core import processes
from cpt_jax.core.config import to_json
from cpt_jax.core.storage import numbers, write_json_atomic
from cpt_jax.data.mixture import domains_of
from cpt_jax.evaluate.bits_per_byte import PackedDocuments, bits_per_byte
from cpt_jax.recipe.model import Model
from cpt_jax.recipe.recipe import Domain, Stage
from cpt_jax.recipe.results import Results
from cpt_jax.sharding.mesh import make_mesh
from cpt_jax.training.watch import Watching
from cpt_jax.vocab.tokenizer import Tokenizer


class Watched(Results):
    """What a stage's watch is made of."""

    def watched_domains(self, stage: Stage) -> list[Domain]:
        """Those that the watch names, or all that are not new."""
        assert stage.watch is not None
        names = stage.watch.domains
        return [each for each in self.recipe.domains if (each.name in names if names else each.role != "new")]

    def measure_base(self, stage: Stage) -> None:
        """The base's bits per byte on the watch's sample, in the types of training."""
        if stage.watch is None:
            return
        domains, settings = self.watched_domains(stage), self.recipe.evaluation
        heldout = [self.marks[f"hold-out-{domain.name}"] for domain in domains]
        precision = to_json(self.recipe.precision)
        shape = [settings.sequence_length, stage.watch.max_bytes]
        inputs = [precision, shape, self.marks["base"], heldout, self.template_given()]

        def build() -> None:
            model, mesh = self.lineage.after("base", "last"), make_mesh(shape=self.mesh)
            weights = model.on_mesh(self.recipe.precision, mesh)
            found = {
                domain.name: bits_per_byte(
                    model.network,
                    weights,
                    self._sample(domain, self.base_tokenizer, stage, self._length_for(model)),
                    batch_size=settings.batch_size,
                    precision=self.recipe.precision,
                    mesh=mesh,
                ).bits_per_byte
                for domain in domains
            }
            if processes.is_first():
                write_json_atomic(self._base_file(stage), found)

        self._station(f"watch-base-{stage.name}", inputs, [self._base_file(stage)], build, together=True)

    def watching(self, stage: Stage, model: Model) -> Watching | None:
        """The watch, built.

        Args:
          model: as it is trained; `looped` is what reads its weights.
        """
        if stage.watch is None:
            return None
        base = processes.told(numbers(json.loads(self._base_file(stage).read_text())) if processes.is_first() else None)
        domains, export = self.watched_domains(stage), self.recipe.export
        of_export = export.weights == "ema" and stage is self.recipe.stages[-1]
        replayed = set(self.recipe.named("replay"))
        return Watching(
            watch=stage.watch,
            network=model.looped().network,
            documents={
                domain.name: self._sample(domain, self.tokenizer, stage, self._length_for(model)) for domain in domains
            },
            base=base,
            old=tuple(domain.name for domain in domains if domain.role != "new"),
            replayed=tuple(name for name in domains_of(stage.mixture) if name in replayed),
            batch_size=self.recipe.evaluation.batch_size,
            precision=self.recipe.precision,
            average=stage.ema if of_export else None,
        )

    def _base_file(self, stage: Stage) -> Path:
        return self.path / "evaluations" / f"watch-base-{stage.name}.json"

    def _sample(self, domain: Domain, tokenizer: Tokenizer, stage: Stage, length: int) -> PackedDocuments:
        assert stage.watch is not None
        return self._packed(domain, tokenizer, length, stage.watch.max_bytes)
