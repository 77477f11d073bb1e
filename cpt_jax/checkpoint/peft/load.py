"""A PEFT adapter, read as ours."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cpt_jax.checkpoint.peft.config import FILE, PeftLoRA, read_peft_config
from cpt_jax.checkpoint.peft.modules import (
    PREFIX,
    ROWS,
    WEIGHTS,
    Module,
    Pair,
    linears,
    prefixes,
    separated,
    stacked_experts,
    vocabulary_modules,
)
from cpt_jax.checkpoint.safetensors_file import SafetensorsFile
from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import Tree, flatten, unflatten
from cpt_jax.models.decoder import DecoderConfig, abstract_decoder
from cpt_jax.models.linear import LINEARS, LoRAConfig

_RESIZED = (".weight", ".token_adapter.base_layer.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedRows:
    """Rows of a vocabulary table by token id: not differences, but what stands in the place of the base's."""

    ids: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """What an adapter changes in its base: low-rank factors (paths like "layers/attention/q/lora_a"), and rows of the
    tables "embed" and "head", all float32. `base` is where it says that its base is."""

    lora: LoRAConfig | None
    factors: Tree
    rows: Mapping[str, TrainedRows]
    base: str | None

    def base_rows(self, total_rows: int) -> int | None:
        """How many of the vocabulary's rows it leaves as they are, if those that it changes are the last ones."""
        changed = np.unique(np.concatenate([rows.ids for rows in self.rows.values()] or [np.zeros(0, np.int64)]))
        first = total_rows - len(changed)
        return first if 0 < first < total_rows and np.array_equal(changed, np.arange(first, total_rows)) else None

    def over(self, config: DecoderConfig, weights: Tree) -> Tree:
        """The base's weights with the adapter's factors beside them, and its rows in the place of theirs."""
        flat = flatten(weights) | flatten(self.factors)
        for table, rows in self.rows.items():
            first = 0
            for part, count in config.table_rows.items():
                inside = (rows.ids >= first) & (rows.ids < first + count)
                if inside.any():
                    leaf = np.array(flat[f"{table}/{part}"], np.float32)
                    leaf[rows.ids[inside] - first] = rows.values[inside]
                    flat[f"{table}/{part}"] = leaf
                first += count
        return unflatten(flat)


def load_adapter(directory: Path, config: DecoderConfig, hf_config: dict) -> Adapter:
    """A PEFT LoRA adapter of a base with this configuration.

    Its modules may differ in rank and scale: all get the largest rank, filled up with zeros, and by how much a
    module's scale is not `lora.scale` goes into its B. A layer without an adapter, where others have one, gets zeros
    for A and B, and so no gradient: what PEFT would not train does not train.

    Raises:
      UserError: no adapter, pickles, what is not supported, tensors missing, too many, or of other shapes.
    """
    directory = Path(directory)
    settings = read_peft_config(directory)
    adapted = [module for module in linears(config, hf_config) if settings.adapts(module.name)]
    adapted += [module for module in stacked_experts(config) if settings.adapts_parameter(module.name)]
    keys = prefixes(adapted)
    shapes = {
        f"{keys[module]}.lora_{factor}.weight": shape
        for module in adapted
        for factor, shape in zip("AB", module.shapes(settings.rank_of(module.name)), strict=True)
    }
    file = _weights_file(directory)
    # By name without prefix; "embed_out" is what transformers 4 called GPT-NeoX's head.
    tensors = {name.removeprefix(PREFIX).replace("embed_out.", "lm_head."): name for name in file.tensors}
    tables = _vocabulary(directory, config, hf_config, settings, tensors)
    shapes |= {key: (len(ids), config.hidden_size) for key, (_, ids) in tables.items()}
    if not shapes:
        raise UserError(f"{directory / FILE} has target_modules={settings.targets!r}, which this base does not have")
    _check_tensors(directory, file, tensors, shapes)

    def read(key: str) -> np.ndarray:
        return file.read(tensors[key]).astype(np.float32)

    pairs = {
        module: module.from_file((read(f"{key}.lora_A.weight"), read(f"{key}.lora_B.weight")))
        for module, key in keys.items()
    }
    rows: dict[str, TrainedRows] = {}
    for key, (table, ids) in tables.items():
        if table in rows:
            rows[table].values[ids] = read(key)
        else:
            rows[table] = TrainedRows(ids=ids, values=read(key))
    lora, factors = _assembled(config, settings, pairs)
    return Adapter(lora=lora, factors=factors, rows=_untied(directory, config, settings, rows), base=settings.base)


def _weights_file(directory: Path) -> SafetensorsFile:
    if (directory / WEIGHTS).exists():
        return SafetensorsFile(directory / WEIGHTS)
    if pickles := sorted(path.name for path in directory.glob("*.bin")):
        raise UserError(
            f"{directory} has its weights as pickle only ({pickles[0]}), which can run code: save the adapter with a newer PEFT, as safetensors"
        )
    raise UserError(f"{directory} has no {WEIGHTS}: give a directory that PEFT's save_pretrained wrote")


def _check_tensors(
    directory: Path, file: SafetensorsFile, tensors: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """That the file has the tensors that are asked for, and no others."""
    for key, shape in shapes.items():
        if key not in tensors:
            raise UserError(f"{directory} lacks the tensor {PREFIX + key!r}: save the adapter again")
        if (given := file.tensors[tensors[key]].shape) != shape:
            raise UserError(
                f"{directory}: {tensors[key]} has shape {list(given)}, base and {FILE} ask for {list(shape)}: give the base that it was trained on"
            )
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise UserError(
            f"{directory} holds a tensor {tensors[extra[0]]!r} that is no LoRA factor of this base and none of its vocabulary rows: merge it with PEFT (merge_and_unload) and give the result as base"
        )


def _vocabulary(
    directory: Path, config: DecoderConfig, hf_config: dict, settings: PeftLoRA, tensors: Mapping[str, str]
) -> dict[str, tuple[str, np.ndarray]]:
    """The tensors with rows of the vocabulary, by name: (our table, token ids)."""
    modules = vocabulary_modules(config, hf_config)

    def table_of(name: str, field: str) -> str:
        short = name.replace("embed_out", "lm_head")
        for table, module in modules.items():
            if module == short or module.endswith(f".{short}"):
                return table
        raise UserError(
            f"{directory / FILE} has {field} with {name!r}; only {' and '.join(modules.values())} are supported"
        )

    found: dict[str, tuple[str, np.ndarray]] = {}
    every = np.arange(config.total_rows)
    for table in {table_of(name, "modules_to_save"): None for name in settings.whole_modules}:
        found[f"{modules[table]}.weight"] = (table, every)
    # PEFT saves tables that were resized without being asked to.
    for table, module in modules.items():
        found |= {key: (table, every) for end in _RESIZED if (key := f"{module}{end}") in tensors}
    tokens = settings.token_indices
    for name, ids in (tokens if isinstance(tokens, dict) else {modules["embed"]: tokens}).items():
        table, indices = table_of(name, "trainable_token_indices"), np.asarray(ids, np.int64)
        if not len(ids):
            continue
        if len(np.unique(indices)) != len(ids) or indices.min() < 0 or indices.max() >= config.total_rows:
            raise UserError(
                f"{directory / FILE} has trainable_token_indices of {name} that are not distinct ids below {config.total_rows}: give the base with the extended vocabulary"
            )
        # Of a tied head, PEFT saves the rows only where it resized the table.
        for each in ("embed", "head") if config.tie_word_embeddings and table == "embed" else (table,):
            if (key := f"{modules[each]}{ROWS}") in tensors or each == "embed" or not config.tie_word_embeddings:
                found[key] = (each, indices)
    return found


def _untied(
    directory: Path, config: DecoderConfig, settings: PeftLoRA, rows: dict[str, TrainedRows]
) -> dict[str, TrainedRows]:
    """The rows; those of a head that is tied only once.

    Raises:
      UserError: the adapter's head is another than its embedding, and the base's is not.
    """
    if not (config.tie_word_embeddings and rows):
        return rows
    embed, head = rows.get("embed"), rows.get("head")
    whole = embed is not None and len(embed.ids) == config.total_rows
    # Trained as a copy of its own, the embedding leaves the head behind.
    alone = whole and head is None and bool(settings.whole_modules) and not settings.ties
    same = embed is not None and (
        head is None or (np.array_equal(embed.ids, head.ids) and np.array_equal(embed.values, head.values))
    )
    if embed is None or alone or not same:
        raise UserError(
            f"{directory} has a head that is not its embedding, while the base has tie_word_embeddings=true: untie the base, or train with ensure_weight_tying=True"
        )
    return {"embed": embed}


def _assembled(
    config: DecoderConfig, settings: PeftLoRA, pairs: Mapping[Module, Pair]
) -> tuple[LoRAConfig | None, Tree]:
    """One configuration for all modules, and the factors, stacked over layers."""
    kinds: dict[tuple[str, ...], dict[Module, Pair]] = {}
    for module, pair in pairs.items():
        kinds.setdefault(module.paths, {})[module] = pair
    found = {key: pair for kind in kinds.values() for key, pair in separated(kind).items()}
    if not found:
        return None, {}
    (module, _), (a, _) = max(found.items(), key=lambda item: item[1][0].shape[-1])
    rank, scale = a.shape[-1], settings.scale_of(module.name)
    paths = {place.path for _, place in found}
    targets = tuple(name for name in LINEARS if any(path.endswith(f"/{name}") for path in paths))
    lora = LoRAConfig(rank=rank, alpha=scale * rank, targets=targets)
    shapes = flatten(abstract_decoder(config, lora).shapes)
    flat = {
        path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items() if path.endswith(("/lora_a", "/lora_b"))
    }
    for (module, place), (a, b) in found.items():
        ratio = np.float32(settings.scale_of(module.name) / scale)
        flat[f"{place.path}/lora_a"][place.index][..., : a.shape[-1]] = a
        flat[f"{place.path}/lora_b"][place.index][..., : b.shape[-2], :] = b * ratio
    return lora, unflatten(flat)
