"""The methods: which weights train, and what is attached to the model, or laid out anew in it, for that."""

import dataclasses
import fnmatch
from typing import Literal

from cpt_jax.adapt.expand import Expand
from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import flatten, match
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.models.layer_groups import without_group
from cpt_jax.models.linear import ADAPTER_LEAVES, CONSTANTS, LINEARS, LoRAConfig, Scaling
from cpt_jax.models.vocab_table import NEW_ROWS, TABLES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embeddings:
    """The vocabulary's rows: the new ones only, or all of them; of all tables, or of the head's ("output") or the others
    ("input") where it has one."""

    rows: Literal["new", "all"] = "new"
    tables: Literal["both", "input", "output"] = "both"

    def lora_config(self) -> LoRAConfig | None:
        return None

    def layout(self, config: DecoderConfig) -> DecoderConfig:
        if self.tables != "both" and config.tie_word_embeddings:
            raise UserError(
                f"Embeddings(tables={self.tables!r}): this model's head is its embedding (tie_word_embeddings): give tables='both'"
            )
        return config

    def trains(self, path: str) -> bool:
        table, _, part = path.partition("/")
        wanted = {"both": True, "input": table != "head", "output": table == "head"}[self.tables]
        return table in TABLES and wanted and (part == "new" or self.rows == "all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters on linear layers (Hu et al. 2021, arXiv 2106.09685), and besides the new rows, where there are
    any, and the norms.

    `targets`, `rank_pattern` and `alpha_pattern` name linears ("q"), or match their paths ("layers/mlp/*").
    `scaling` "alpha/sqrt(rank)" is rsLoRA (Kalajdzievski 2023, arXiv 2312.03732); `dora` also trains each output's
    magnitude (DoRA: Liu et al. 2024, arXiv 2402.09353). `dropout` is the share of the adapters' inputs that is dropped
    in training; with DoRA too, only the adapter's input drops, not the frozen product's.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = LINEARS
    scaling: Scaling = "alpha/rank"
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    dora: bool = False
    dropout: float = 0.0
    new_rows: bool = True
    norms: bool = False

    def __post_init__(self) -> None:
        self.lora_config()

    def lora_config(self) -> LoRAConfig | None:
        return LoRAConfig(
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            scaling=self.scaling,
            rank_pattern=tuple(self.rank_pattern.items()),
            alpha_pattern=tuple(self.alpha_pattern.items()),
            dora=self.dora,
            dropout=self.dropout,
        )

    def layout(self, config: DecoderConfig) -> DecoderConfig:
        paths = flatten(abstract_decoder(config, self.lora_config()).shapes)
        if not any(path.endswith(ADAPTER_LEAVES) for path in paths):
            linears = [path.removesuffix("/kernel") for path in paths if path.endswith("/kernel")]
            raise UserError(
                f"LoRA targets {', '.join(self.targets)} are not in this model; there are: {', '.join(linears)}"
            )
        return config

    def trains(self, path: str) -> bool:
        of_norm = path.rpartition("/")[0].endswith("norm")
        return path.endswith(ADAPTER_LEAVES) or (self.new_rows and path in NEW_ROWS) or (self.norms and of_norm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByPath:
    """The weights whose paths match a pattern ("layers/attention/*", "final_norm/scale"); of the layers' weights, only
    those of the layers from the first number of `layers` up to the second, which is the first not to train."""

    patterns: tuple[str, ...]
    layers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None and not (len(self.layers) == 2 and 0 <= self.layers[0] < self.layers[1]):
            raise UserError(f"ByPath: layers is {list(self.layers)}: give the first, and the first that does not train")

    def lora_config(self) -> LoRAConfig | None:
        return None

    def layout(self, config: DecoderConfig) -> DecoderConfig:
        matched = match(self.patterns, flatten(abstract_decoder(config).shapes))
        if self.layers is None:
            return config
        first, last = self.layers
        if last > config.num_layers:
            raise UserError(f"ByPath: layers is {list(self.layers)}, but the model has {config.num_layers}")
        if not any(path.startswith("layers/") for path in matched):
            raise UserError(f"ByPath: layers is {list(self.layers)}, but no pattern matches a weight of the layers")
        groups = (("before", first), ("chosen", last - first), ("after", config.num_layers - last))
        return dataclasses.replace(config, layer_groups=tuple(group for group in groups if group[1]))

    def trains(self, path: str) -> bool:
        whole = path if self.layers is None else without_group(path, ("before", "chosen", "after"))
        if self.layers is not None and path.startswith("layers/") and not path.startswith("layers/chosen/"):
            return False
        return not path.endswith(CONSTANTS) and any(fnmatch.fnmatchcase(whole, each) for each in self.patterns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full:
    """Every weight, but for what released models keep as a constant (Gemma 4's factors of layers, two numbers of Apertus's
    activation) or balance experts with (a router's correction bias)."""

    def lora_config(self) -> LoRAConfig | None:
        return None

    def layout(self, config: DecoderConfig) -> DecoderConfig:
        return config

    def trains(self, path: str) -> bool:
        return not path.endswith(CONSTANTS)


# `lora_config` says which adapters are attached; `layout` how the model is laid out to train, or raises a UserError
# where the model does not have what the method asks for; `trains` which weights of the result train, by path.
Method = Embeddings | LoRA | ByPath | Expand | Full
