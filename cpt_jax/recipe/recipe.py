"""The recipe: everything that decides what a run computes. It is saved as the run's config.json, which replays it."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from cpt_jax.adapt import ByPath, Context, Embeddings, Expand, Full, Linear, LoRA, Theta, Yarn
from cpt_jax.checkpoint.keep import Keep
from cpt_jax.core.config import to_json
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.storage import MOST_BYTES, is_file_name
from cpt_jax.data.cleaning import Cleaning
from cpt_jax.data.holdout import Holdout
from cpt_jax.data.mixture import Phase, Phases, Ramp, Temperature, domains_of
from cpt_jax.data.sources import Corpus
from cpt_jax.models.kernels.choice import AttentionChoice
from cpt_jax.models.remat import Remat
from cpt_jax.recipe.stage import Stage
from cpt_jax.training.retention import Anchor, L2ToStart, MeanTeacher
from cpt_jax.training.watch import RaiseReplay, Stop, Watch
from cpt_jax.vocab.extend import ContinuedBPE, Extension
from cpt_jax.vocab.gate import Limits
from cpt_jax.vocab.init_rows import InitRows, SubwordMean, Wechsel

Role = Literal["new", "replay", "watch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain:
    """A corpus and its part in the run: `new` is to be learnt, `replay` is to be kept, `watch` is measured and never
    trained on."""

    corpus: Corpus
    role: Role
    # The share of documents (or groups) that neither the tokenizer nor training ever sees, chosen by hash.
    heldout: Holdout = Holdout()
    # What is left out of training besides: filtered, said before, or part of an evaluation set.
    cleaning: Cleaning = Cleaning()

    @property
    def name(self) -> str:
        return self.corpus.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """How the tokenizer grows on the new domains' training text, and what the new rows start from.

    `drop_unreachable` leaves out pieces that the extended tokenizer never produces on that text.
    """

    extension: Extension = ContinuedBPE(new_tokens=2000)
    drop_unreachable: bool = False
    initial_rows: InitRows = SubwordMean()
    limits: Limits = Limits()

    @property
    def files(self) -> list[Path]:
        """What the new rows are made from besides the base and texts."""
        rows = self.initial_rows
        return [Path(rows.source), Path(rows.target)] if isinstance(rows, Wechsel) else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How bits per byte are measured: rows of `sequence_length` (of a base that reads less, of what it reads), in float32
    unless told otherwise."""

    sequence_length: int = 512
    batch_size: int = 4
    precision: Precision = Precision(compute="float32")

    def __post_init__(self) -> None:
        for field in ("sequence_length", "batch_size"):
            if getattr(self, field) < 1:
                raise UserError(f"evaluation.{field} is {getattr(self, field)}: give a number of at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Prompts continued greedily by the base and by the result."""

    prompts: tuple[str, ...] = ()
    new_tokens: int = 48

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise UserError(
                f"samples.new_tokens is {self.new_tokens}: give at least 1; without prompts there is no text"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """What leaves the house: the last weights or their moving average, as a whole model or as a PEFT adapter.

    `interpolate_base`: share of the base in every old weight, (1 - share) * trained + share * base (WiSE-FT: Wortsman
    et al. 2021, arXiv 2109.01903); new rows, which the base does not have, stay as trained. `shard_gb`: largest
    weight file, in 10^9 bytes.
    """

    weights: Literal["last", "ema"] = "last"
    interpolate_base: float = 0.0
    adapter: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    shard_gb: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.interpolate_base < 1:
            raise UserError(f"interpolate_base is {self.interpolate_base}: give a share of at least 0 and below 1")
        if not 0 < self.shard_gb < math.inf:
            raise UserError(f"shard_gb is {self.shard_gb}: give more than 0")
        if self.adapter and (self.interpolate_base or self.dtype != "float32"):
            raise UserError("an adapter holds what was trained, in float32: export the whole model for anything else")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. `base` is a HF directory, a .gguf file or a hub id.

    `context`: the base is made to read longer texts, before anything is trained. `chat_template`: a Jinja file that
    conversations are written by, and that is exported; by default the tokenizer's own.
    """

    name: str
    base: str
    domains: tuple[Domain, ...]
    stages: tuple[Stage, ...]
    vocabulary: Vocabulary | None = None
    context: Context | None = None
    chat_template: str | None = None
    precision: Precision = Precision(compute="bfloat16")
    evaluation: Evaluation = Evaluation()
    samples: Samples = Samples()
    # In training, each vocabulary table is padded to a multiple of so many rows.
    pad_vocabulary_to: int = 128
    # What computes attention in training; "auto" takes the best for the device, the rows and the type.
    attention: AttentionChoice = "auto"
    # Layers compiled as a loop ("scan") or one by one ("unroll"); "auto": one by one on CPUs and GPUs, which is faster.
    layer_loop: Literal["auto", "scan", "unroll"] = "auto"
    export: Export = Export()
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_file_name(self.name):
            raise UserError(f"recipe name {self.name!r}: give one of at most {MOST_BYTES} bytes without '/'")
        if self.pad_vocabulary_to < 1:
            raise UserError(f"pad_vocabulary_to is {self.pad_vocabulary_to}: give at least 1 (no padding)")
        # Each stage has one of its own behind it, of 32 bits.
        most = 2**32 - 1 - len(self.stages)
        if not 0 <= self.seed <= most:
            raise UserError(f"seed is {self.seed}: give 0 to {most}")
        names = [domain.name for domain in self.domains]
        for kind, given in (("domain", names), ("stage", [stage.name for stage in self.stages])):
            if len(set(given)) != len(given):
                raise UserError(f"{kind} names must differ: {', '.join(given)}")
        if not self.named("new"):
            raise UserError("a recipe needs at least one domain with role 'new': there is nothing to learn")
        watched = set(self.named("watch"))
        for stage in self.stages:
            for domain in domains_of(stage.mixture):
                if domain not in names:
                    raise UserError(f"stage {stage.name!r} mixes {domain!r}, but the domains are {', '.join(names)}")
                if domain in watched:
                    raise UserError(
                        f"stage {stage.name!r} trains on {domain!r}, whose role is 'watch': make it 'replay'"
                    )
                if self.domains[names.index(domain)].heldout.share == 1:
                    raise UserError(
                        f"stage {stage.name!r} trains on {domain!r}, of which all is held out (heldout.share 1): give it a smaller share"
                    )
            if self.vocabulary is None and isinstance(stage.method, Embeddings) and stage.method.rows == "new":
                raise UserError(
                    f"stage {stage.name!r} trains new rows only, but the recipe grows no vocabulary: drop the stage"
                )
            self._check_watch(stage)
        self.check_export(self.export)

    def _check_watch(self, stage: Stage) -> None:
        watch, old = stage.watch, [*self.named("replay"), *self.named("watch")]
        if watch is None:
            return
        for name in watch.domains:
            if name not in (names := [domain.name for domain in self.domains]):
                raise UserError(f"stage {stage.name!r} watches {name!r}, but the domains are {', '.join(names)}")
        if not old or (watch.domains and watch.budget is not None and not set(watch.domains) & set(old)):
            raise UserError(
                f"stage {stage.name!r} has a forgetting watch, and nothing that may be forgotten: give a domain the role "
                "'replay' or 'watch'"
            )
        if isinstance(watch.budget, RaiseReplay) and not set(domains_of(stage.mixture)) & set(self.named("replay")):
            raise UserError(
                f"stage {stage.name!r} is to raise its replay, and replays nothing: put a domain with role 'replay' in its "
                "mixture, or give the budget Stop"
            )

    def check_export(self, export: Export) -> None:
        """Raises a UserError where the stages do not keep what is to be exported."""
        if export.weights == "ema" and (not self.stages or self.stages[-1].ema is None):
            raise UserError("the EMA weights are to be exported, but the last stage keeps none: export the last ones")

    @property
    def changes_base(self) -> bool:
        """Whether the stages begin with another model than the base."""
        return self.vocabulary is not None or self.context is not None

    def named(self, role: str) -> list[str]:
        return [domain.name for domain in self.domains if domain.role == role]


def saved_form(recipe: Recipe) -> dict[str, Any]:
    """What a run's config.json holds. Without a longer context, what it held before there was such a thing."""
    document = to_json(recipe)
    if recipe.context is None:
        del document["context"]
    return document


__all__ = [
    "Anchor",
    "ByPath",
    "Cleaning",
    "Context",
    "Domain",
    "Embeddings",
    "Evaluation",
    "Expand",
    "Export",
    "Full",
    "Keep",
    "L2ToStart",
    "Linear",
    "LoRA",
    "MeanTeacher",
    "Phase",
    "Phases",
    "RaiseReplay",
    "Ramp",
    "Recipe",
    "Remat",
    "Samples",
    "Stage",
    "Stop",
    "Temperature",
    "Theta",
    "Vocabulary",
    "Watch",
    "Yarn",
]
