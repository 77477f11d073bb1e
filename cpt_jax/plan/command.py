"""`cpt plan`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from cpt_jax.adapt import Embeddings, Full, LoRA, Method
from cpt_jax.checkpoint.hf import read_config
from cpt_jax.checkpoint.hub import hub_parts, is_hub_id
from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import quiet_libraries, say
from cpt_jax.core.stores import Location, fetched, is_address, write_json
from cpt_jax.models.families import family_for
from cpt_jax.models.remat import Remat
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.plan.hardware import Hardware, hardware_named, prepare
from cpt_jax.plan.plan import StagePlan, explain, plan_stage, size
from cpt_jax.plan.search import Candidate, candidates, remat_name, search
from cpt_jax.plan.stage import PlannedStage, planned_stages
from cpt_jax.recipe.find import apply_overrides, find_model, find_recipe
from cpt_jax.recipe.recipe import Stage
from cpt_jax.report.tables import text_table
from cpt_jax.sharding.mesh import MeshShape

METHODS: dict[str, Method] = {"full": Full(), "lora": LoRA(rank=16, alpha=32), "new-rows": Embeddings(rows="new")}
SHOWN = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What differs from the recipe, or makes a stage of a model alone; None: as it is there, or a default."""

    method: str | None = None
    sequence: int | None = None
    batch: int | None = None
    accumulate: int | None = None
    remat: str | None = None
    tokens: int | None = None
    new_tokens: int | None = None
    ema: bool = False

    def __post_init__(self) -> None:
        for name in ("sequence", "batch", "accumulate", "tokens", "new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}: give at least 1")

    def changes(self) -> dict[str, Any]:
        """The stage's fields that are given."""
        fields: dict[str, Any] = {
            "sequence_length": self.sequence,
            "batch_size": self.batch,
            "accumulate": self.accumulate,
            "tokens": self.tokens,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        if self.remat is not None:
            given["remat"] = None if self.remat == "none" else Remat.parse(self.remat)
        return given


def plan(
    *,
    recipe: str | None,
    model: str | None,
    overrides: list[str],
    hardware: str,
    mesh: str | None,
    stage: str | None,
    wanted: Wanted,
    searching: bool,
    compiled: int,
    price: float | None,
    json_path: Location | None,
) -> None:
    """Prints the plan of every stage (or of one), or with `searching` the best ways to run it.

    Raises:
      UserError: wrong input; see also `planned_stages` and `compile_stage`.
    """
    quiet_libraries()
    if price is not None and not price >= 0:
        raise UserError(f"--price is {price:g}: give what a chip's hour costs")
    if compiled < 1:
        raise UserError(f"--compile is {compiled}: give at least 1")
    found, shape = hardware_named(hardware), None if mesh is None else MeshShape.parse(mesh)
    prepare(found)
    stages = _stages(recipe, model, overrides, wanted, found, shape or MeshShape())
    if stage is not None:
        names = [each.stage.name for each in stages]
        stages = [each for each in stages if each.stage.name == stage]
        if not stages:
            raise UserError(f"there is no stage {stage!r}; there are: {', '.join(names)}")
    plans: list[StagePlan] = []
    ranked: list[Candidate] = []
    for planned in stages:
        if searching:
            given = wanted.batch or (planned.stage.batch_size if recipe is not None else None)
            ranked = candidates(planned, found, shape, batch_size=given, remat_given=wanted.remat is not None)
            if not ranked:
                raise UserError(f"stage {planned.stage.name!r}: no mesh of {found.chips} devices divides its batch")
            print(_ranking(ranked, found))
            plans += search(ranked, found, compiled, price)
        else:
            say(f"compiling stage {planned.stage.name} for {found.name}")
            plans.append(plan_stage(planned, found, shape, price))
    print("\n\n".join(explain(each) for each in plans))
    if json_path is not None:
        figures = [each.figures() for each in plans]
        summary: dict[str, Any] = {"plans": figures}
        if searching:
            summary["candidates"] = [_figures(each) for each in ranked]
        # Of one stage, its figures stand at the top.
        write_json(json_path, summary | (figures[0] if figures else {}))


def _stages(
    recipe: str | None, model: str | None, overrides: list[str], wanted: Wanted, hardware: Hardware, shape: MeshShape
) -> list[PlannedStage]:
    if recipe is None:
        if model is None:
            raise UserError("give a RECIPE, or --model with a model's directory or config.json")
        if overrides:
            raise UserError(f"{overrides[0]!r} overrides a recipe's field, and there is no recipe")
        return [_of_model(model, wanted, hardware, shape)]
    for name in ("method", "new_tokens"):
        if getattr(wanted, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} goes with --model alone: a recipe has its own")
    made = apply_overrides(find_recipe(recipe), overrides)
    stages = tuple(dataclasses.replace(stage, **wanted.changes()) for stage in made.stages)
    return planned_stages(dataclasses.replace(made, stages=stages), hf_config_of(model or made.base))


def _of_model(model: str, wanted: Wanted, hardware: Hardware, shape: MeshShape) -> PlannedStage:
    """A stage on a model alone: by default one row of 8,192 tokens, or what the model reads, on each device."""
    return stage_of_model(hf_config_of(model), wanted, hardware, shape)


def stage_of_model(hf_config: dict, wanted: Wanted, hardware: Hardware, shape: MeshShape) -> PlannedStage:
    """A stage of text alone, AdamW, on a model's config.json."""
    config = family_for(hf_config).config_from_hf(hf_config)
    method = METHODS[wanted.method or "full"]
    new_tokens = wanted.new_tokens or 0
    if isinstance(method, Embeddings) and not new_tokens:
        raise UserError("--method new-rows trains rows that --new-tokens adds: give their number")
    shape = shape.over(hardware.chips)
    sequence = wanted.sequence or min(8192, config.context_length)
    settings: dict[str, Any] = {
        "name": wanted.method or "full",
        "method": method,
        "mixture": {"text": 1.0},
        "tokens": 1_000_000_000,
        "batch_size": shape.replica * (shape.fsdp or 1) * shape.expert * (wanted.accumulate or 1),
        "sequence_length": sequence,
        "optimizer": AdamW(learning_rate=1e-5),
        "ema": EMA() if wanted.ema else None,
    }
    config = method.layout(dataclasses.replace(config, new_rows=new_tokens, row_multiple=128))
    return PlannedStage(stage=Stage(**(settings | wanted.changes())), config=config, hf_config=hf_config)


def hf_config_of(model: str) -> dict:
    """A model's config.json: a file, a directory, or a hub id, of which nothing else is fetched."""
    path = Path(model).expanduser()
    if path.suffix == ".json":
        with fetched(model if is_address(model) else path) as file:
            if not file.is_file():
                raise UserError(f"{model} does not exist: give a model's config.json or directory")
            try:
                return json.loads(file.read_text())
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{model} is not JSON ({error}): give a model's config.json") from error
    if not is_hub_id(model):
        return read_config(find_model(model))
    import huggingface_hub

    hub_id, revision = hub_parts(model)
    try:
        found = huggingface_hub.hf_hub_download(hub_id, "config.json", revision=revision)
        return json.loads(Path(found).read_text())
    except Exception as error:
        raise UserError(
            f"hub id {model!r}: its config.json could not be fetched ({type(error).__name__}): give a directory or a config.json as --model"
        ) from error


def _figures(candidate: Candidate) -> dict:
    stage = candidate.planned.stage
    return {
        "mesh": dataclasses.asdict(candidate.shape),
        "batch_size": stage.batch_size,
        "accumulate": stage.accumulate,
        "remat": remat_name(stage.remat),
        "fits_on_paper": candidate.fits,
        "bytes_on_paper": candidate.paper.total,
        "sent_on_paper": candidate.paper.sent,
        "seconds_on_paper": candidate.seconds,
        "tokens_per_second_on_paper": candidate.tokens_per_second,
    }


def _ranking(ranked: list[Candidate], hardware: Hardware) -> str:
    """The first candidates as a table."""
    rows = [("mesh", "rows", "parts", "remat", "a device, on paper", "tokens/s, on paper")]
    for each in ranked[:SHOWN]:
        sizes = [f"{name}={count}" for name, count in dataclasses.asdict(each.shape).items() if count != 1]
        stage = each.planned.stage
        memory = size(each.paper.total) + ("" if each.fits else " (too much)")
        rows.append(
            (
                ",".join(sizes),
                str(stage.batch_size),
                str(stage.accumulate),
                remat_name(stage.remat),
                memory,
                f"{each.tokens_per_second:,.0f}",
            )
        )
    fitting = sum(each.fits for each in ranked)
    return f"{len(ranked)} ways on {hardware.name}, {fitting} fit on paper:\n{text_table(rows)}\n"
