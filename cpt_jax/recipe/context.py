"""What the stations of a run share."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from cpt_jax.checkpoint.base import MADE_OF, resolve_base
from cpt_jax.core import processes
from cpt_jax.core.checksums import checksums
from cpt_jax.core.config import fingerprint
from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import Plan
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.data.chat import ChatEncoder
from cpt_jax.data.chat_template import ChatTemplate, read_template
from cpt_jax.data.records import Unreadable
from cpt_jax.models.generate import check_room
from cpt_jax.recipe.copies import is_of_model
from cpt_jax.recipe.grow import check_fits
from cpt_jax.recipe.lineage import Lineage
from cpt_jax.recipe.recipe import Domain, Recipe, Stage
from cpt_jax.recipe.stations import Workdir, identity
from cpt_jax.sharding.mesh import MeshShape, make_mesh, preset
from cpt_jax.training.guard import HANG_SECONDS
from cpt_jax.training.profile import ProfiledSteps
from cpt_jax.training.trackers import Tracking
from cpt_jax.vocab.tokenizer import Tokenizer


def is_read(path: Path) -> bool:
    """Whether a file decides what a base is. One that was made of another file says when that was, too."""
    return is_of_model(path) and path.name != MADE_OF


class RunContext:
    """One run while it is worked on: its recipe, its directory, its base, and the fingerprints of the stations that are
    done, which link those that depend on each other."""

    def __init__(self, recipe: Recipe, workdir: Workdir) -> None:
        self.recipe, self.workdir, self.path = recipe, workdir, workdir.path
        self.marks: dict[str, str] = {}
        self.plan: Plan | None = None
        self.profiled: ProfiledSteps | None = None
        self.mesh: MeshShape | None = None
        self.hang_seconds: float | None = HANG_SECONDS
        self.unreadable: Unreadable = "stop"
        self.tracking: Tracking | None = None

    def _station(self, name: str, inputs: object, outputs: list[Path], build, **how: Any) -> None:
        def work() -> None:
            if self.plan is not None:
                self.plan.begin(name)
            build()

        self.marks[name] = self.workdir.station(name, inputs, outputs, work, **how)
        if self.plan is not None:
            self.plan.end(name)
            if self.workdir.was_done(name):
                self.plan.skip(name)

    def resolve(self) -> None:
        """The base as a model directory, its configuration, tokenizer and chat template checked."""
        # What has to be fetched, or made, is there when the first process comes back; where each has a copy of the
        # directory, each makes its own.
        if processes.is_first() and self.workdir.shared is not None:
            self.workdir.shared.base(self.recipe.base, self.path / "source")
        if processes.is_first() and self.workdir.mirror is None:
            resolve_base(self.recipe.base, self.path / "source")
        processes.wait("the base is there")
        self.source = resolve_base(self.recipe.base, self.path / "source")
        self.base_tokenizer = Tokenizer(self.source)
        self.marks["base"] = fingerprint(self._content_of_base())
        self.lineage = Lineage(self.recipe, self.path, self.source, self.base_tokenizer.size)
        model = self.lineage.after("base", "last")
        if self.recipe.vocabulary is None:
            check_fits(self.base_tokenizer, model.config.total_rows, self.source)
        if any(domain.corpus.format == "chat" for domain in self.recipe.domains):
            self.chat_encoder(self.base_tokenizer)
        self.parameters = model.parameters
        longest = max(
            [self.recipe.evaluation.sequence_length, *(stage.sequence_length for stage in self.recipe.stages)]
        )
        context = self.recipe.context
        reads = model.config.context_length
        if context is not None:
            context.over(model.hf_config)
            reads = context.length
        if longest > reads:
            raise UserError(
                f"sequence_length {longest} is longer than the model's context of {reads}: lower it in the stages and the evaluation, or give the recipe a longer context"
            )
        prompts = self.base_tokenizer.encode_marked(list(self.recipe.samples.prompts))
        ids = [[self.base_tokenizer.start_id, *prompt.ids] for prompt in prompts]
        check_room(model.config, ids, self.recipe.samples.new_tokens)
        for stage in self.recipe.stages:
            context = self.mesh_of(stage).shape["context"]
            model.attending(self.recipe.attention, stage.sequence_length, self.recipe.precision.dtype, context=context)

    def mesh_of(self, stage: Stage) -> Mesh:
        """The devices that a stage trains on.

        Raises:
          UserError: the stage's rows or their tokens do not divide over them.
        """
        rows, length = stage.batch_size // stage.accumulate, stage.sequence_length
        mesh = make_mesh(shape=self.mesh or preset(jax.devices(), rows, length))
        stage.check_mesh(MeshShape(**mesh.shape))
        return mesh

    def _content_of_base(self) -> dict[str, str]:
        """SHA-256 of the files that the base is read from, of which the first process's count. A hub or a copy gives the
        same files other times, and another place; they are read again only where these are not as they were."""
        if not processes.is_first():
            return {}
        kept, seen = self.path / ".base.json", identity(self.source)
        if kept.exists() and (found := json.loads(kept.read_text()))["seen"] == seen:
            return found["content"]
        content = checksums(self.source, filter(is_read, self.source.iterdir()))
        write_json_atomic(kept, {"seen": seen, "content": content})
        return content

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's own, once its station is done."""
        return Tokenizer(self.path / "tokenizer")

    @property
    def template_file(self) -> Path | None:
        """The chat template that the recipe gives instead of the tokenizer's own."""
        return None if self.recipe.chat_template is None else Path(self.recipe.chat_template)

    def template_given(self) -> str | None:
        """Its text, for the inputs of stations."""
        return None if self.template_file is None else read_template(self.template_file)

    def chat_encoder(self, tokenizer: Tokenizer) -> ChatEncoder:
        return ChatEncoder(tokenizer, ChatTemplate(tokenizer, self.template_file))

    def _data(self, domain: Domain) -> Path:
        return self.path / "data" / domain.name
