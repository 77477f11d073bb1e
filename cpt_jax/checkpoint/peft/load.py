"""A PEFT adapter, read as ours."""

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from cpt_jax.checkpoint.peft.config import FILE, MERGE, PeftLoRA, read_peft_config
from cpt_jax.checkpoint.peft.modules import (
    MAGNITUDE,
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
from cpt_jax.checkpoint.peft.norms import asked_norms, with_norms
from cpt_jax.checkpoint.safetensors_file import SafetensorsFile
from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import Tree, flatten, unflatten
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.models.families.schema import Place
from cpt_jax.models.linear import ADAPTER_LEAVES, PATHS, AdapterConfig, LoRAConfig, with_magnitudes

_RESIZED = (".weight", ".token_adapter.base_layer.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedRows:
    """Rows of a vocabulary table by token id: not differences, but what stands in the place of the base's."""

    ids: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """What an adapter changes in its base: low-rank factors and magnitudes (paths like "layers/attention/q/lora_a"),
    rows of vocabulary tables ("embed", "head"), and norms, all float32. `base` is where it says that its base is."""

    lora: LoRAConfig | None
    factors: Tree
    rows: Mapping[str, TrainedRows]
    norms: Mapping[Place, np.ndarray]
    base: str | None

    def base_rows(self, total_rows: int) -> int | None:
        """How many of the vocabulary's rows it leaves as they are, if those that it changes are the last ones."""
        changed = np.unique(np.concatenate([rows.ids for rows in self.rows.values()] or [np.zeros(0, np.int64)]))
        first = total_rows - len(changed)
        return first if 0 < first < total_rows and np.array_equal(changed, np.arange(first, total_rows)) else None

    def over(self, config: DecoderConfig, weights: Tree) -> Tree:
        """The base's weights with the adapter's factors beside them, and its rows and norms in the place of theirs."""
        flat = flatten(with_norms(weights, self.norms)) | flatten(self.factors)
        for table, rows in self.rows.items():
            first = 0
            for part, count in config.table_rows.items():
                inside = (rows.ids >= first) & (rows.ids < first + count)
                if inside.any():
                    leaf = np.array(flat[f"{table}/{part}"], np.float32)
                    leaf[rows.ids[inside] - first] = rows.values[inside]
                    flat[f"{table}/{part}"] = leaf
                first += count
        return unflatten(flat) if self.lora is None else with_magnitudes(unflatten(flat), self.lora)


def load_adapter(directory: Path, config: DecoderConfig, hf_config: dict) -> Adapter:
    """A PEFT LoRA adapter of a base with this configuration.

    The same module may differ in rank and scale by layer: all layers get the largest rank, filled up with zeros, and
    the scale that belongs to it; by how much another's scale is not that goes into its B. A layer without an adapter,
    where others have one, gets zeros for A and B, and so no gradient: what PEFT would not train does not train.

    Raises:
      UserError: no adapter, pickles, what is not supported, tensors missing, too many, or of other shapes.
    """
    directory = Path(directory)
    settings = read_peft_config(directory)
    file = _weights_file(directory)
    # By name without prefix; "embed_out" is what transformers 4 called GPT-NeoX's head.
    tensors = {name.removeprefix(PREFIX).replace("embed_out.", "lm_head."): name for name in file.tensors}
    adapted = _adapted(config, hf_config, settings, tensors)
    keys = prefixes(adapted)
    shapes = {
        f"{keys[module]}.lora_{factor}.weight": shape
        for module in adapted
        for factor, shape in zip("AB", module.shapes(settings.rank_of(module.name)), strict=True)
    }
    if settings.dora:
        _check_dora(directory, settings, adapted)
        shapes |= {f"{keys[module]}{MAGNITUDE}": (module.outputs,) for module in adapted}
    norms, norm_entries = asked_norms(config, hf_config, settings.whole_modules)
    tables = _vocabulary(directory, config, hf_config, settings, tensors, norm_entries)
    widths = flatten(abstract_decoder(config).shapes)
    shapes |= {
        key: (len(ids), config.hidden_size if table == "head" else widths[f"{table}/base"].shape[1])
        for key, (table, ids) in tables.items()
    }
    shapes |= {name: (widths[place.path].shape[-1],) for name, place in norms.items()}
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
    magnitudes = {module: read(f"{key}{MAGNITUDE}") for module, key in keys.items()} if settings.dora else {}
    lora, factors = _assembled(config, settings, pairs, magnitudes)
    rows = _untied(directory, config, settings, rows)
    changed = {place: read(name) for name, place in norms.items()}
    return Adapter(lora=lora, factors=factors, rows=rows, norms=changed, base=settings.base)


def _adapted(config: DecoderConfig, hf_config: dict, settings: PeftLoRA, tensors: Collection[str]) -> list[Module]:
    """The modules that have an adapter. Of experts one by one, which are no modules in transformers 5, only where the file
    has some of them: their names are the shared expert's too."""
    found = [
        module
        for module in linears(config, hf_config)
        if settings.adapts(module.name) or settings.adapts_parameter(f"{module.name}.weight")
    ]
    if not any(module.of_one_expert and f"{module.name}.lora_A.weight" in tensors for module in found):
        found = [module for module in found if not module.of_one_expert]
    return found + [module for module in stacked_experts(config, hf_config) if settings.adapts_parameter(module.name)]


def _check_dora(directory: Path, settings: PeftLoRA, adapted: Sequence[Module]) -> None:
    """That each module with magnitudes has them in all layers: what stands in the others' place depends on the base."""
    counts = Counter(module.paths for module in adapted)
    if any(module.experts is not None or module.of_one_expert for module in adapted):
        raise UserError(f"{directory / FILE} has use_dora=true on experts, which is not supported: {MERGE}")
    if len(set(counts.values())) > 1 or settings.layers is not None:
        raise UserError(f"{directory / FILE} has use_dora=true in some layers only, which is not supported: {MERGE}")


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
    directory: Path,
    config: DecoderConfig,
    hf_config: dict,
    settings: PeftLoRA,
    tensors: Mapping[str, str],
    norms: Collection[str],
) -> dict[str, tuple[str, np.ndarray]]:
    """The tensors with rows of the vocabulary, by name: (our table, token ids)."""
    modules = vocabulary_modules(config, hf_config)

    def table_of(name: str, field: str) -> str:
        short = name.replace("embed_out", "lm_head")
        for table, module in modules.items():
            if module == short or module.endswith(f".{short}"):
                return table
        raise UserError(
            f"{directory / FILE} has {field} with {name!r}; only {', '.join(modules.values())} and norms are supported"
        )

    found: dict[str, tuple[str, np.ndarray]] = {}
    every = np.arange(config.total_rows)
    for table in {table_of(name, "modules_to_save"): None for name in settings.whole_modules if name not in norms}:
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
    embed, head = rows.get("embed"), rows.get("head")
    if not config.tie_word_embeddings or (embed is None and head is None):
        return rows
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
    return {table: each for table, each in rows.items() if table != "head"}


def _assembled(
    config: DecoderConfig,
    settings: PeftLoRA,
    pairs: Mapping[Module, Pair],
    magnitudes: Mapping[Module, np.ndarray],
) -> tuple[LoRAConfig | None, Tree]:
    """One configuration for all modules, and their leaves, stacked over layers."""
    kinds: dict[tuple[str, ...], dict[Module, Pair]] = {}
    for module, pair in pairs.items():
        kinds.setdefault(module.paths, {})[module] = pair
    found = {key: pair for kind in kinds.values() for key, pair in separated(kind, settings.dora).items()}
    if not found:
        return None, {}
    lora = _configuration(settings, found)
    shapes = flatten(abstract_decoder(config, lora).shapes)
    flat = {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items() if path.endswith(ADAPTER_LEAVES)}
    for (module, place), (a, b) in found.items():
        adapter = lora.adapter(place.path)
        assert adapter is not None
        ratio = np.float32(settings.scale_of(module.name) / adapter.scale)
        flat[f"{place.path}/lora_a"][place.index][..., : a.shape[-1]] = a
        flat[f"{place.path}/lora_b"][place.index][..., : b.shape[-2], :] = b * ratio
        if settings.dora:
            flat[f"{place.path}/magnitude"][place.index] = magnitudes[module][module.rows(place)]
    return lora, unflatten(flat)


def _configuration(settings: PeftLoRA, found: Mapping[tuple[Module, Place], Pair]) -> LoRAConfig:
    """Each linear's rank is its largest of all layers; what most of them have is the adapters' own."""
    adapters: dict[str, AdapterConfig] = {}
    for (module, place), (a, _) in found.items():
        path, rank = place.path, a.shape[-1]
        if path not in adapters or adapters[path].rank < rank:
            alpha = settings.scale_of(module.name) * (math.sqrt(rank) if settings.rank_stabilised else rank)
            scaling = "alpha/sqrt(rank)" if settings.rank_stabilised else "alpha/rank"
            # Noise of the multiplication apart, alphas are the numbers of the file.
            alpha = float(f"{alpha:.12g}")
            adapters[path] = AdapterConfig(rank=rank, alpha=alpha, scaling=scaling, dora=settings.dora, dropout=0.0)
    (usual, _), *_ = Counter(adapters.values()).most_common()
    paths = [path for path in PATHS if path in adapters]
    return LoRAConfig(
        rank=usual.rank,
        alpha=usual.alpha,
        targets=tuple(paths),
        scaling=usual.scaling,
        rank_pattern=tuple((path, adapters[path].rank) for path in paths if adapters[path].rank != usual.rank),
        alpha_pattern=tuple((path, adapters[path].alpha) for path in paths if adapters[path].alpha != usual.alpha),
        dora=settings.dora,
    )
