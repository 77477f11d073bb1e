"""The methods: which weights train, and which adapters are attached for it."""

import dataclasses
from typing import Literal

from cpt_jax.models.linear import LINEARS, LoRAConfig

_NEW_ROWS = ("embed/new", "head/new")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embeddings:
    """The vocabulary's rows, in and out: the new ones only, or all of them."""

    rows: Literal["new", "all"] = "new"

    def lora_config(self) -> LoRAConfig | None:
        return None

    def trains(self, path: str) -> bool:
        return path in _NEW_ROWS or (self.rows == "all" and path.startswith(("embed/", "head/")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters on linear layers (arXiv 2106.09685), and the new rows besides where there are any."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = LINEARS
    new_rows: bool = True

    def __post_init__(self) -> None:
        self.lora_config()

    def lora_config(self) -> LoRAConfig | None:
        return LoRAConfig(rank=self.rank, alpha=self.alpha, targets=self.targets)

    def trains(self, path: str) -> bool:
        return path.endswith(("/lora_a", "/lora_b")) or (self.new_rows and path in _NEW_ROWS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full:
    """Every weight."""

    def lora_config(self) -> LoRAConfig | None:
        return None

    def trains(self, path: str) -> bool:
        return True


Method = Embeddings | LoRA | Full
