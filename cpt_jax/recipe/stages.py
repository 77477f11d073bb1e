"""The stations that train: what each stage follows from, and what it is trained with."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from cpt_jax.core.config import fingerprint, to_json
from cpt_jax.core.progress import number_of, say
from cpt_jax.core.tree import Tree
from cpt_jax.data.loader import Loader
from cpt_jax.data.mixture import domains_of, mean_shares
from cpt_jax.data.prepare import read_manifest
from cpt_jax.recipe.model import Model
from cpt_jax.recipe.recipe import Stage
from cpt_jax.recipe.stations import Begun
from cpt_jax.recipe.watching import Watched
from cpt_jax.training.ending import ended_early
from cpt_jax.training.loop import train
from cpt_jax.training.training import Training


class Stages(Watched):
    """What of a run trains its stages."""

    makes_loader: functools.partial[Loader]

    def train(self, index: int, stage: Stage) -> None:
        def build() -> None:
            training = self.training(index, stage)
            with contextlib.closing(training.loader):
                trained = train(training, self.plan)
            self.lineage.remember(stage, trained)

        name, inputs, outputs, may_change = self._stage_station(index, stage)
        self._station(name, inputs, outputs, build, together=True, **may_change)

    def begin_stage(self, index: int, stage: Stage) -> Begun:
        """A stage that is trained together with other runs' (`training`, `makes_loader`); `end_stage` is to follow."""
        name, inputs, outputs, may_change = self._stage_station(index, stage)
        begun = self.workdir.begin(name, inputs, outputs, **may_change)
        self.marks[begun.name] = begun.fingerprint
        if self.plan is not None:
            (self.plan.skip if begun.done else self.plan.begin)(name)
        return begun

    def end_stage(self, stage: Stage, begun: Begun, trained: dict[str, Tree]) -> None:
        self.workdir.end(begun)
        if self.plan is not None:
            self.plan.end(begun.name)
        self.lineage.remember(stage, trained)

    def _stage_station(self, index: int, stage: Stage) -> tuple[str, object, list[Path], dict[str, Any]]:
        """(name, inputs, outputs, what may be changed while it is under way: `changeable` and `sources` of a station)."""
        directory = self.lineage.directory(index, stage)
        upstream = self.marks[f"stage-{self.recipe.stages[index - 1].name}" if index else "base-model"]
        # By their content: where a corpus has another time, and the same text, nothing is trained again.
        directories = {domain.name: self._data(domain) for domain in self.recipe.domains}
        data = {
            name: fingerprint([dataclasses.asdict(shard) for shard in read_manifest(directories[name]).shards.values()])
            for name in domains_of(stage.mixture)
        }
        settings = to_json(stage)
        # A stage that is under way goes on with what is changed of these.
        changeable = [settings.pop(field) for field in ("mixture", "max_epochs", "watch")]
        if stage.watch is not None:
            # Without a budget it only measures.
            watched = [self.marks[f"hold-out-{domain.name}"] for domain in self.watched_domains(stage)]
            changeable[-1] = None if stage.watch.budget is None else [changeable[-1], watched]
        # How often it is saved, what of that stays, and what is computed twice, does not change what is computed.
        for field in ("checkpoint_seconds", "keep", "remat"):
            settings.pop(field)
        precision, padding = to_json(self.recipe.precision), self.recipe.pad_vocabulary_to
        inputs = [settings, precision, padding, self.recipe.seed + index, upstream]
        last, _ = ended_early(directory) or (stage.steps, "")
        # Without its last checkpoint, which may have been damaged and removed, a stage is not done.
        outputs = [directory, directory / "checkpoints" / str(last)]
        return f"stage-{stage.name}", inputs, outputs, {"changeable": changeable, "sources": data}

    def training(self, index: int, stage: Stage) -> Training:
        """All that a stage whose earlier ones are done is trained with; `makes_loader` makes its loader again."""
        seed = self.recipe.seed + index
        before = self.recipe.stages[index - 1].name if index else "extended"
        model = self.lineage.after(before, "last").adapted(stage.method, seed)
        model = model.for_training(jax.default_backend(), stage.remat, self.recipe.layer_loop)
        self.makes_loader = self._makes_loader(index, stage)
        loader, length = self.makes_loader(), stage.sequence_length
        dtype, context = self.recipe.precision.dtype, self.mesh_of(stage).shape["context"]
        model = model.attending(self.recipe.attention, length, dtype, loader.documents, context)
        self.lineage.forget()
        return self._training(stage, model, loader, self.lineage.directory(index, stage), seed)

    def _makes_loader(self, index: int, stage: Stage) -> functools.partial[Loader]:
        """Makes the loader of a stage, in another process too."""
        directories = {domain.name: self._data(domain) for domain in self.recipe.domains}
        self._tell_repetitions(stage, directories)
        return functools.partial(
            Loader,
            stage.mixture,
            directories,
            sequence_length=stage.sequence_length,
            batch_size=stage.batch_size,
            start_id=self.tokenizer.start_id,
            end_id=self.tokenizer.end_id,
            tokenizer=self.tokenizer.fingerprint,
            seed=self.recipe.seed + index,
            steps=stage.steps,
            packing=stage.packing,
            pack_domains=stage.pack_domains,
            long_documents=stage.long_documents,
            max_epochs=stage.max_epochs,
            unreadable=self.unreadable,
        )

    def _tell_repetitions(self, stage: Stage, directories: dict[str, Path]) -> None:
        tokens = {name: read_manifest(directories[name]).tokens for name in domains_of(stage.mixture)}
        for name, share in mean_shares(stage.mixture, tokens).items():
            epochs = stage.steps * stage.batch_size * stage.sequence_length * share / tokens[name]
            most = (stage.max_epochs or {}).get(name)
            if most is not None and epochs > most:
                say(
                    f"stage {stage.name}: {name} is small: after {number_of(most, 'epoch')} (of {epochs:.1f}) its share goes to the others"
                )
            elif epochs > 4:
                say(f"stage {stage.name}: {name} will be read {epochs:.1f} times; more than 4 repetitions teach little")

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
            watching=self.watching(stage, model),
            tracking=self.tracking,
            stored=None if self.workdir.mirror is None else self.workdir.mirror.checkpoints(directory, stage.keep),
        )
