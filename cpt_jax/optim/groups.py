"""Parameter groups: which weights an optimizer treats alike, by their paths."""

from typing import Literal

from cpt_jax.core.precision import VECTORS
from cpt_jax.models.vocab_table import BASE_ROWS, NEW_ROWS

Group = Literal["matrices", "lora_a", "lora_b", "old_rows", "new_rows", "others"]


def group_of(path: str) -> Group:
    """The one group of a weight: the layers' matrices, LoRA's two factors, the vocabulary's old and new rows, and the
    others (norms, biases, magnitudes, routers, the shared expert's gate)."""
    name = path.rpartition("/")[2]
    if path in NEW_ROWS:
        return "new_rows"
    if path in BASE_ROWS:
        return "old_rows"
    if name == "lora_a":
        return "lora_a"
    if name == "lora_b":
        return "lora_b"
    return "matrices" if name == "kernel" and not path.endswith("/shared_gate/kernel") else "others"


def stacked_axes(path: str, rank: int) -> int:
    """How many of a leaf's first axes count layers (and experts), and are no part of its matrix or vector."""
    return rank - (1 if path.rpartition("/")[2] in VECTORS else 2)
