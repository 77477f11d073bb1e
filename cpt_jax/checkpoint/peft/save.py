"""What was trained, written as a PEFT adapter."""

import math
import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cpt_jax.checkpoint.hf_write import TOKENIZER_FILES
from cpt_jax.checkpoint.hub import hub_parts, is_hub_id
from cpt_jax.checkpoint.peft.config import FILE, NO_TARGET
from cpt_jax.checkpoint.peft.modules import (
    FACTORS,
    MAGNITUDE,
    PREFIX,
    ROWS,
    WEIGHTS,
    Module,
    Pair,
    joined,
    linears,
    prefixes,
    stacked_experts,
    vocabulary_modules,
)
from cpt_jax.checkpoint.peft.norms import norm_places, norms_part
from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import atomic_directory, write_json_atomic
from cpt_jax.core.tree import Tree, flatten
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import family_for
from cpt_jax.models.families.composite import Composite
from cpt_jax.models.families.schema import MLP, Place
from cpt_jax.models.linear import ADAPTER_LEAVES, KERNEL_NORM, AdapterConfig, LoRAConfig, column_norms
from cpt_jax.models.vocab_table import BASE_ROWS, NEW_ROWS, TABLES

Held = Literal["rows", "whole"]
_Part = tuple[dict[str, Any], dict[str, np.ndarray]]
# model_types of which PEFT 0.21 renames the targets of all feed-forwards to those of experts
# (utils/transformers_weight_conversion.py): linears that every token goes through are named by their weights, which it
# adapts as it does other parameters.
_TAKEN_FOR_EXPERTS = ("qwen3_next", "glm4_moe", "glm4_moe_lite", "deepseek_v2", "deepseek_v3", "ernie4_5_moe")
_TAKEN_FOR_EXPERTS += ("dots1", "exaone_moe", "hunyuan_v1_moe", "solar_open")
_COMMON = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
}


class HeldByAdapter(NamedTuple):
    """How each vocabulary table is held that was trained, whether all norms are, and the linears that are adapted."""

    tables: dict[str, Held]
    norms: bool
    adapted: list[Module]


def held_by_adapter(
    config: DecoderConfig, hf_config: dict, paths: Collection[str], trained: Iterable[str], lora: LoRAConfig | None
) -> HeldByAdapter:
    """What a PEFT adapter is to hold.

    Args:
      paths: of all weights, with the factors of `lora` beside their kernels.
      trained: of all weights that are not the base's.

    Raises:
      UserError: nothing was trained, or something that an adapter cannot hold.
    """
    trained = {path for path in trained if not path.endswith((*ADAPTER_LEAVES, KERNEL_NORM))}
    norms = {place.path for place in norm_places(config, hf_config).values()}
    # PEFT asks for norms by the ends of their names, which are those of others too: all of them, or none.
    every_norm = norms <= trained and not isinstance(family_for(hf_config), Composite)
    tables = _trained_tables(trained - norms if every_norm else trained)
    if lora is None:
        if not tables and not every_norm:
            raise UserError(
                "nothing was trained that an adapter could hold: train with LoRA, or export the whole model"
            )
        return HeldByAdapter(tables, every_norm, [])
    # Experts as transformers 5 has them, not one by one.
    layers = [module for module in linears(config, hf_config) if not module.of_one_expert]
    layers += stacked_experts(config, hf_config)
    adapted = [module for module in layers if any(f"{path}/lora_a" in paths for path in module.paths)]
    if (taken := [module for module in adapted if _taken(module, hf_config)]) and (lora.dora or lora.dropout):
        others = sorted({f"{path.rpartition('/')[0]}/*" for module in taken for path in module.paths})
        raise UserError(
            f"PEFT has no {'DoRA' if lora.dora else 'dropout'} on the linears of {hf_config['model_type']} that every token goes through: leave {', '.join(others)} out of the targets, or export the whole model"
        )
    refused = getattr(family_for(hf_config), "NOT_ADAPTED", ())
    if found := next((module for module in adapted if module.name.endswith(refused)), None):
        raise UserError(
            f"PEFT adapts no {_last(found.name)} of {hf_config['model_type']}: leave {found.paths[0]!r} out of the targets, or export the whole model"
        )
    return HeldByAdapter(tables, every_norm, adapted)


def save_adapter(
    directory: Path,
    config: DecoderConfig,
    weights: Tree,
    hf_config: dict,
    lora: LoRAConfig | None,
    *,
    base: str,
    trained: Iterable[str],
    tokenizer_directory: Path | None = None,
    dtype: Any = np.float32,
) -> dict[str, Held]:
    """Writes what was trained as a PEFT adapter of its base, whose vocabulary is extended already.

    Args:
      weights: with the factors of `lora` beside their kernels.
      base: where PEFT finds the base: a directory, or a hub id, ORG/NAME or ORG/NAME@REVISION.
      trained: paths of all weights that are not the base's.
      tokenizer_directory: whose tokenizer goes along.

    Returns:
      How each trained vocabulary module is held: its new rows, or the whole table.

    Raises:
      UserError: nothing was trained, or something that an adapter cannot hold; the disk is full.
    """
    from safetensors.numpy import save_file

    flat, dtype = flatten(weights), np.dtype(dtype)
    tables, every_norm, adapted = held_by_adapter(config, hf_config, flat, trained, lora)
    fields, factors = _lora_part(hf_config, flat, lora, adapted, dtype)
    vocabulary, rows = _vocabulary_part(config, hf_config, flat, tables, dtype)
    if every_norm:
        modules, tensors = norms_part(config, hf_config, flat, dtype)
        vocabulary["modules_to_save"] = [*vocabulary.get("modules_to_save", []), *modules]
        rows |= tensors
    with atomic_directory(Path(directory)) as out:
        save_file(factors | rows, out / WEIGHTS, metadata={"format": "pt"})
        write_json_atomic(out / FILE, _COMMON | _place(base) | fields | vocabulary)
        for name in TOKENIZER_FILES:
            if tokenizer_directory is not None and (source := Path(tokenizer_directory) / name).exists():
                shutil.copyfile(source, out / name)
    names = vocabulary_modules(config, hf_config)
    return {_last(names[table]): held for table, held in tables.items()}


def _place(base: str) -> dict[str, str | None]:
    name, revision = hub_parts(base) if is_hub_id(base) else (base, None)
    return {"base_model_name_or_path": name, "revision": revision}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _trained_tables(trained: Iterable[str]) -> dict[str, Held]:
    """How each table that was trained goes into an adapter."""
    paths = sorted(trained)
    if other := [path for path in paths if path not in BASE_ROWS + NEW_ROWS]:
        raise UserError(
            f"an adapter cannot hold {len(other)} of the trained weights, {other[0]!r} first: export the whole model, or train LoRA, vocabulary rows and all norms only"
        )
    found: dict[str, Held] = {}
    for table in TABLES:
        if f"{table}/base" in paths:
            found[table] = "whole"
        elif f"{table}/new" in paths:
            found[table] = "rows"
    return found


def _lora_part(
    hf_config: dict, flat: dict[str, Any], lora: LoRAConfig | None, adapted: Sequence[Module], dtype: np.dtype
) -> _Part:
    """The factors: fields of adapter_config.json, and tensors."""
    if lora is None:
        return {"r": 1, "lora_alpha": 1, "target_modules": NO_TARGET}, {}
    shared = {paths: _shared(paths, flat) for paths in {module.paths for module in adapted}}
    settings: dict[tuple[str, bool], AdapterConfig] = {}
    tensors: dict[str, np.ndarray] = {}
    for module, prefix in prefixes(adapted).items():
        own = _settings(lora, flat, module)
        first = next(iter(own.values()))
        # A file has one scale for all parts: the others' goes into their B.
        parts = {place: _factors(flat, place, each.scale / first.scale, dtype) for place, each in own.items()}
        pair = joined(module, parts, shared[module.paths])
        for factor, matrix in zip("AB", module.to_file(pair), strict=True):
            tensors[f"{PREFIX}{prefix}.lora_{factor}.weight"] = matrix
        if lora.dora:
            tensors[f"{PREFIX}{prefix}{MAGNITUDE}"] = _magnitudes(flat, module, dtype)
        settings[_target(module, hf_config)] = first.of_rank(pair[0].shape[-2])
    return _lora_fields(lora, hf_config, settings), tensors


def _settings(lora: LoRAConfig, flat: dict[str, Any], module: Module) -> dict[Place, AdapterConfig]:
    """Those of the module's parts that have an adapter."""
    found = {place: lora.adapter(place.path) for place in module.parts}
    return {place: each for place, each in found.items() if each is not None and f"{place.path}/lora_a" in flat}


def _factors(flat: dict[str, Any], place: Place, share: float, dtype: np.dtype) -> Pair:
    """Our (A, B * share) of one place."""
    a, b = (np.asarray(flat[place.path + factor][place.index], dtype) for factor in FACTORS)
    return a, b if share == 1 else b * dtype.type(share)


def _magnitudes(flat: dict[str, Any], module: Module, dtype: np.dtype) -> np.ndarray:
    """Of all the module's outputs; where a part has no adapter, its kernel's own."""
    whole = np.zeros(module.outputs, dtype)
    for place in module.parts:
        if (magnitude := flat.get(f"{place.path}/magnitude")) is None:
            magnitude = column_norms(flat[f"{place.path}/kernel"])
        whole[module.rows(place)] = np.asarray(magnitude[place.index], dtype)
    return whole


def _shared(paths: tuple[str, ...], flat: dict[str, Any]) -> bool:
    """Whether all parts with an adapter have the same A, as those of an adapter that PEFT trained."""
    first, *others = (flat[f"{path}/lora_a"] for path in paths if f"{path}/lora_a" in flat)
    return all(np.array_equal(np.asarray(first), np.asarray(other)) for other in others)


def _taken(module: Module, hf_config: dict) -> bool:
    return (
        hf_config["model_type"] in _TAKEN_FOR_EXPERTS and module.experts is None and _last(module.name) in MLP.values()
    )


def _target(module: Module, hf_config: dict) -> tuple[str, bool]:
    """(the name that targets it in all layers, and nothing else; whether that is a parameter)."""
    parts = module.name.split(".")
    if _taken(module, hf_config):
        return ".".join([*parts[-2:], "weight"]), True
    if module.experts is not None:
        return ".".join(parts[-3:] if "mlp" in parts else parts[-2:]), True
    # Patterns of ranks compare the ends of names, and the chosen experts' have the same.
    return ".".join(parts[-2:] if parts[-2].startswith("shared_expert") else parts[-1:]), False


def _lora_fields(lora: LoRAConfig, hf_config: dict, settings: dict[tuple[str, bool], AdapterConfig]) -> dict[str, Any]:
    by_name = {name: each for (name, _), each in settings.items()}
    other_alpha = {name: each.alpha for name, each in by_name.items() if not math.isclose(each.alpha, lora.alpha)}
    family = family_for(hf_config)
    fields: dict[str, Any] = {
        "r": lora.rank,
        "lora_alpha": _number(lora.alpha),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.scaling == "alpha/sqrt(rank)",
        "use_dora": lora.dora,
        "target_modules": sorted(name for name, parameter in settings if not parameter),
        "rank_pattern": {name: each.rank for name, each in by_name.items() if each.rank != lora.rank},
        "alpha_pattern": {name: _number(alpha) for name, alpha in other_alpha.items()},
    }
    parameters = sorted(name for name, parameter in settings if parameter)
    if isinstance(family, Composite):
        # What sees has layers of the same names.
        fields["exclude_modules"] = f"(?!{re.escape(family.prefix)}).*"
    return fields | ({"target_parameters": parameters} if parameters else {})


def _number(value: float) -> int | float:
    """As PEFT writes it: whole, where it is."""
    return int(value) if float(value).is_integer() else float(value)


def _vocabulary_part(
    config: DecoderConfig, hf_config: dict, flat: dict[str, Any], tables: dict[str, Held], dtype: np.dtype
) -> _Part:
    """The tables: fields of adapter_config.json, and tensors."""
    modules = vocabulary_modules(config, hf_config)
    fields: dict[str, Any] = {}
    tensors: dict[str, np.ndarray] = {}
    for table, held in tables.items():
        parts = ["new"] if held == "rows" else list(config.table_rows)
        rows = [np.asarray(flat[f"{table}/{part}"][: config.table_rows[part]], dtype) for part in parts]
        values, name = np.ascontiguousarray(np.concatenate(rows)), _last(modules[table])
        if held == "rows":
            indices = list(range(config.vocab_size, config.total_rows))
            fields["trainable_token_indices"] = fields.get("trainable_token_indices", {}) | {name: indices}
            tensors[f"{PREFIX}{modules[table]}{ROWS}"] = values
            continue
        fields["modules_to_save"] = [*fields.get("modules_to_save", []), name]
        tensors[f"{PREFIX}{modules[table]}.weight"] = values
        if config.tie_word_embeddings and table == "embed":
            # PEFT keeps a tied head tied if it is told to, and yet wants to read it.
            fields["ensure_weight_tying"] = True
            tensors[f"{PREFIX}{modules['head']}.weight"] = values.copy()
    return fields, tensors
