"""The model card of an export: README.md in the hub's format (a YAML head, then Markdown)."""

import json
from collections.abc import Sequence
from typing import Any

from cpt_jax.checkpoint.hub import hub_parts, is_hub_id, name_of_base
from cpt_jax.core.config import to_json
from cpt_jax.data.mixture import described
from cpt_jax.recipe.recipe import Domain, Export, Recipe, Stage, saved_form

ROLES = {"new": "learnt", "replay": "replayed, to be kept", "watch": "measured only"}


# HERE: the adapter's directory, or its hub id.
_LOAD = """```python
from peft import PeftModel
from transformers import {loader}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(HERE)
model = {loader}.from_pretrained({base})
{grow}model = PeftModel.from_pretrained(model, HERE)
```"""
_GROW = """if len(tokenizer) > len(model.get_input_embeddings().weight):
    model.resize_token_embeddings(len(tokenizer))
"""


def model_card(
    recipe: Recipe,
    export: Export,
    entries: Sequence[dict],
    tokens: dict[str, int],
    released: str | None,
    loader: str,
) -> str:
    """The card: base, data, mixture, recipe, and bits per byte of every stage on every domain.

    Args:
      entries: of eval.json.
      tokens: of each prepared domain, in the model's tokenizer.
      released: the hub id at which the base lies as a whole model; None: at none.
      loader: transformers' class that loads the base.
    """
    head = {
        # A hub id; a local path would mean nothing to others.
        **({"base_model": hub_parts(recipe.base)[0]} if is_hub_id(recipe.base) else {}),
        "library_name": "peft" if export.adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["continued-pretraining", "cpt_jax"],
    }
    yaml = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in head.items())
    sections = [
        f"---\n{yaml}\n---\n\n# {recipe.name}",
        _summary(recipe, export),
        *(["## Loading it\n\n" + _loading(recipe, released, loader)] if export.adapter else []),
        "## Results\n\nBits per byte of held-out text (lower is better); in parentheses the change against the base."
        + _unmeasured(export, entries)
        + "\n\n"
        + _results(recipe, entries),
        "## Data\n\n" + _data(recipe.domains, tokens),
        "## Training\n\n" + _training(recipe.stages),
        "<details><summary>The whole recipe</summary>\n\n```json\n"
        + json.dumps(_without_places(saved_form(recipe)), ensure_ascii=False, indent=1)
        + "\n```\n\n</details>",
    ]
    return "\n\n".join(sections) + "\n"


def _without_places(value: Any) -> Any:
    """Settings with local files by their names alone: where they lie is nobody else's business."""
    if isinstance(value, dict):
        return {key: each if key == "samples" else _without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    return _file_name(value) if isinstance(value, str) and value.startswith(("/", "~")) else value


def _file_name(place: str) -> str:
    return place.rstrip("/").rsplit("/", 1)[-1]


def _summary(recipe: Recipe, export: Export) -> str:
    learnt, kept = (", ".join(recipe.named(role)) for role in ("new", "replay"))
    lines = [
        f"`{name_of_base(recipe.base)}`, continued in pre-training on {learnt}"
        + (f", with {kept} replayed." if kept else ".")
    ]
    if recipe.vocabulary is not None:
        lines.append("Its vocabulary is larger than the base's; every id of the base keeps its meaning.")
    if recipe.context is not None:
        how = type(recipe.context.rope).__name__
        lines.append(
            f"It reads {recipe.context.length:,} tokens, more than the base does (positions stretched by {how})."
        )
    weights = "the moving average (EMA) of the trained weights" if export.weights == "ema" else "the last weights"
    mixed = f", with {export.interpolate_base:g} of the base in every old weight" if export.interpolate_base else ""
    lines.append(f"These are {weights}{mixed}.")
    return " ".join(lines)


def _loading(recipe: Recipe, released: str | None, loader: str) -> str:
    """How an adapter, wherever it lies, comes to its base."""
    rows = (f"{table}/new" for table in ("embed", "head"))
    carried = all(any(stage.method.trains(each) for stage in recipe.stages) for each in rows)
    if released is not None and (recipe.vocabulary is None or carried):
        new = (
            ""
            if recipe.vocabulary is None
            else " The rows of the new pieces are in the adapter, room for them is made:"
        )
        grow = "" if recipe.vocabulary is None else _GROW
        name, revision = hub_parts(released)
        place = f'"{name}"' + (f', revision="{revision}"' if revision else "")
        return f"An adapter (PEFT) of `{released}`.{new}\n\n" + _LOAD.format(base=place, grow=grow, loader=loader)
    return (
        "An adapter (PEFT) of the model in the run's directory `base/`, whose place `adapter_config.json` names as it was: pass "
        "that directory on with the adapter.\n\n" + _LOAD.format(base="BASE", grow="", loader=loader)
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _results(recipe: Recipe, entries: Sequence[dict]) -> str:
    domains = [domain.name for domain in recipe.domains]
    found = {(entry["stage"], entry["weights"], entry["domain"]): entry["bits_per_byte"] for entry in entries}
    rows = []
    for stage, weights in dict.fromkeys((entry["stage"], entry["weights"]) for entry in entries):
        cells = []
        for domain in domains:
            value, base = found[stage, weights, domain], found["base", "last", domain]
            cells.append(f"{value:.3f}" + ("" if stage == "base" else f" ({(value / base - 1) * 100:+.1f}%)"))
        rows.append([stage + (" (EMA)" if weights == "ema" else ""), *cells])
    return _table(["stage", *domains], rows)


def _unmeasured(export: Export, entries: Sequence[dict]) -> str:
    """That the figures are of other weights than those beside the card, where they are."""
    if not export.interpolate_base or any(entry["stage"] == "export" for entry in entries):
        return ""
    return f" These weights, with {export.interpolate_base:g} of the base in them, were not evaluated: the figures are those of the stages before."


def _data(domains: Sequence[Domain], tokens: dict[str, int]) -> str:
    rows = [
        [
            domain.name,
            ROLES[domain.role],
            f"`{domain.corpus.spec if '://' in domain.corpus.spec else _file_name(domain.corpus.spec)}`",
            f"{tokens[domain.name]:,}" if domain.name in tokens else "-",
        ]
        for domain in domains
    ]
    return _table(["domain", "role", "source", "tokens"], rows)


def _training(stages: Sequence[Stage]) -> str:
    rows = []
    for stage in stages:
        method = to_json(stage.method)
        kind = method.pop("kind")
        settings = ", ".join(f"{name}={value}" for name, value in method.items() if not isinstance(value, list))
        rows.append(
            [
                stage.name,
                f"{kind}({settings})",
                f"{stage.steps * stage.batch_size * stage.sequence_length:,}",
                described(stage.mixture),
                f"{stage.optimizer.learning_rate:g}",
                f"{stage.batch_size} x {stage.sequence_length}",
            ]
        )
    return _table(["stage", "method", "tokens", "mixture", "learning rate", "batch"], rows)
