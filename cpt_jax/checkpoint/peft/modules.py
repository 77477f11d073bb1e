"""The linear layers that PEFT adapts, made of ours: several of ours may be one of theirs, and a layer's experts are one.

PEFT writes an adapter as lora_A [rank, inputs] and lora_B [outputs, rank], so that y = W x + scale B (A x). Where a
layer holds several of our matrices, its A is theirs one below the other, its B block-diagonal.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cpt_jax.core.tree import flatten
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.models.families import family_for
from cpt_jax.models.families.schema import Place, Rows
from cpt_jax.models.vocab_table import TABLES

# Of tensors' names in a file, and of the file.
PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"
MAGNITUDE = ".lora_magnitude_vector"
WEIGHTS = "adapter_model.safetensors"
# Of our paths.
FACTORS = ("/lora_a", "/lora_b")
_KERNEL = "/kernel"
# (A, B). Ours: [..., inputs, rank] and [..., rank, outputs]; PEFT's: [..., rank, inputs] and [..., outputs, rank].
Pair = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """A linear layer of transformers' model, or (with `experts`) a parameter [experts, outputs, inputs] of it.

    `parts` are our matrices in it: paths without "/kernel", and which of the outputs are theirs.
    """

    name: str
    parts: tuple[Place, ...]
    inputs: int
    outputs: int
    experts: int | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(place.path for place in self.parts)

    @property
    def of_one_expert(self) -> bool:
        """Whether it is one of those that transformers 5 holds in one parameter."""
        return len(self.parts[0].index) > 1

    @property
    def stack(self) -> tuple[int, ...]:
        return () if self.experts is None else (self.experts,)

    def rows(self, place: Place) -> np.ndarray:
        """The outputs that are this part's."""
        every = np.arange(self.outputs)
        if place.rows is None:
            return every
        return every.reshape(-1, place.rows.block)[:, place.rows.first : place.rows.last].reshape(-1)

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of lora_A and lora_B in a file."""
        ranks = rank * (self.experts or 1)
        return (ranks, self.inputs), (self.outputs, ranks)

    def to_file(self, pair: Pair) -> Pair:
        """A PEFT pair as files hold it. Experts' ranks lie expert by expert in A; in B, rank by rank (as PEFT's
        ParamWrapper reads them)."""
        a, b = pair
        if self.experts is None:
            return np.ascontiguousarray(a), np.ascontiguousarray(b)
        flat = b.transpose(1, 2, 0).reshape(self.outputs, -1)
        return a.reshape(-1, self.inputs), np.ascontiguousarray(flat)

    def from_file(self, pair: Pair) -> Pair:
        """The inverse of `to_file`."""
        a, b = pair
        if self.experts is None:
            return a, b
        return a.reshape(self.experts, -1, self.inputs), b.reshape(self.outputs, -1, self.experts).transpose(2, 0, 1)


def vocabulary_modules(config: DecoderConfig, hf_config: dict) -> dict[str, str]:
    """The module of each of our tables, as transformers 5 names them: it calls every family's head lm_head."""
    family = family_for(hf_config)
    names = family.weight_names(config)
    tables = {p[0].path: name.removesuffix(".weight") for name, p in names.items() if p[0].path in TABLES}
    return {path: in_memory(family, name) for path, name in tables.items()} | {"head": "lm_head"}


def in_memory(family: Any, name: str) -> str:
    """What transformers 5 calls a module, or a tensor, by its name in files."""
    for in_files, of_modules in getattr(family, "MODULES", {}).items():
        name = name.replace(in_files, of_modules)
    return name


def linears(config: DecoderConfig, hf_config: dict) -> list[Module]:
    """The torch linear layers of a model; its experts' too, one by one, as transformers 4 had them."""
    family = family_for(hf_config)
    names = family.weight_names(config)
    shapes = flatten(abstract_decoder(config).shapes)
    found = []
    for name, places in names.items():
        if not (name.endswith(".weight") and all(place.path.endswith(_KERNEL) for place in places)):
            continue
        sizes = [shapes[place.path].shape for place in places]
        parts = tuple(dataclasses.replace(place, path=place.path.removesuffix(_KERNEL)) for place in places)
        outputs = sum(size[-1] for size in sizes)
        module = in_memory(family, name.removesuffix(".weight"))
        found.append(Module(name=module, parts=parts, inputs=sizes[0][-2], outputs=outputs))
    return found


def stacked_experts(config: DecoderConfig, hf_config: dict) -> list[Module]:
    """The parameters in which transformers 5 holds the experts of a layer."""
    if config.experts is None:
        return []
    width, inner, count = config.experts.latent_size or config.hidden_size, config.expert_size, config.experts.count
    family = family_for(hf_config)
    found, outer, path = [], getattr(family, "prefix", "model."), f"layers/{config.experts_name}"
    name = getattr(family, "EXPERTS", "mlp.experts" if config.experts_name == "mlp" else "experts")
    gates, ups = getattr(family, "PARTS", (Rows(2 * inner, 0, inner), Rows(2 * inner, inner, 2 * inner)))
    for number, layer in enumerate(config.layers_with(config.experts_name or "")):
        index, prefix = (number,), f"{outer}layers.{layer}.{name}"
        gate, up = Place(f"{path}/gate", index, True, gates), Place(f"{path}/up", index, True, ups)
        down = Place(f"{path}/down", index, True)
        first = Module(name=f"{prefix}.gate_up_proj", parts=(gate, up), inputs=width, outputs=2 * inner, experts=count)
        if not config.gated:
            alone = Place(up.path, index, True)
            first = Module(name=f"{prefix}.up_proj", parts=(alone,), inputs=width, outputs=inner, experts=count)
        second = Module(name=f"{prefix}.down_proj", parts=(down,), inputs=inner, outputs=width, experts=count)
        found += [first, second]
    return found


def prefixes(modules: Iterable[Module]) -> dict[Module, str]:
    """What the tensors of each adapted module are called, up to ".lora_A.weight".

    A parameter's wrapper takes the place of the module that holds it; a second one wraps the first, in the order in
    which the module declares its parameters.
    """
    found: dict[Module, str] = {}
    inner: dict[str, Module] = {}
    for module in modules:
        found[module] = module.name
        if module.experts is not None:
            container = module.name.rpartition(".")[0]
            if container in inner:
                found[inner[container]] = f"{container}.base_layer"
            found[module], inner[container] = container, module
    return found


def joined(module: Module, parts: Mapping[Place, Pair], shared: bool) -> Pair:
    """The PEFT pair of a module, of our pairs of its parts (those that have one); `shared`: they have the same A."""
    firsts = [a.swapaxes(-1, -2) for a, _ in parts.values()]
    whole = firsts[0] if shared else np.concatenate(firsts, axis=-2)
    second = np.zeros((*module.stack, module.outputs, whole.shape[-2]), whole.dtype)
    first = 0
    for place, (_, b) in parts.items():
        rank = b.shape[-2]
        second[..., module.rows(place), first : first + rank] = b.swapaxes(-1, -2)
        first += 0 if shared else rank
    return whole, second


def separated(pairs: Mapping[Module, Pair], every: bool) -> dict[tuple[Module, Place], Pair]:
    """Our pairs, of the PEFT pairs of modules that hold the same matrices (of other layers).

    Where B is block-diagonal throughout, as `joined` makes it, each part gets its own block back, and parts that are
    zero throughout have no adapter, unless `every` part shall have one. Otherwise they share A.
    """
    parts = next(iter(pairs)).parts
    live = [
        number
        for number in range(len(parts))
        if every or any(b[..., module.rows(module.parts[number]), :].any() for module, (_, b) in pairs.items())
    ] or list(range(len(parts)))
    blocks = all(_is_block_diagonal(module, b, live) for module, (_, b) in pairs.items())
    found: dict[tuple[Module, Place], Pair] = {}
    for module, (a, b) in pairs.items():
        for order, number in enumerate(live if blocks else range(len(parts))):
            place, columns = module.parts[number], slice(None)
            if blocks:
                columns = _block(order, a.shape[-2], len(live))
            second = b[..., module.rows(place), :][..., columns]
            found[module, place] = (a[..., columns, :].swapaxes(-1, -2), second.swapaxes(-1, -2))
    return found


def _block(order: int, ranks: int, count: int) -> slice:
    return slice(order * ranks // count, (order + 1) * ranks // count)


def _is_block_diagonal(module: Module, b: np.ndarray, live: Sequence[int]) -> bool:
    ranks = b.shape[-1]
    if ranks % len(live):
        return False
    outside = b.copy()
    for order, number in enumerate(live):
        outside[..., module.rows(module.parts[number]), _block(order, ranks, len(live))] = 0
    return not outside.any()
