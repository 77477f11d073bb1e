"""What the backward pass recomputes instead of keeping (Chen et al. 2016, arXiv 1604.06174)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from cpt_jax.core.errors import UserError
from cpt_jax.models.products import PRODUCT

# Activations of a block that can be kept by name: queries, keys and values behind their rotation, what the heads mix,
# and the inner activations of the feed-forward (of experts: none).
NAMES = ("queries", "keys", "values", "attention_out", "mlp_gate", "mlp_up")
_OFFLOAD = "offload:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remat:
    """Each layer's activations are computed again in the backward pass, except its input and what is named here.

    `products` keeps the outputs of all matrix products with weights, but for those of adapters' B: they are as large as
    the products that they are added to, and cheap to compute again. `keep` keeps activations by name, and `offload`
    keeps them in the host's memory (accelerators only): see `NAMES`. As one word, of a flag: "all" for a whole layer, or
    what is kept ("products", "attention_out,mlp_up", "offload:mlp_up").
    """

    products: bool = False
    keep: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (*self.keep, *self.offload):
            if name not in NAMES:
                raise UserError(f"remat names the activation {name!r}; there are: {', '.join(NAMES)}, products")
        if both := set(self.keep) & set(self.offload):
            raise UserError(f"remat both keeps and offloads {', '.join(sorted(both))}: name it once")

    @classmethod
    def parse(cls, text: str) -> "Remat":
        """Of one word.

        Raises:
          UserError: it names no activation.
        """
        parts = [] if text == "all" else text.split(",")
        offloaded = [part for part in parts if part.startswith(_OFFLOAD)]
        return cls(
            products="products" in parts,
            keep=tuple(part for part in parts if part not in (*offloaded, "products")),
            offload=tuple(part.removeprefix(_OFFLOAD) for part in offloaded),
        )

    def __str__(self) -> str:
        parts = [*(["products"] if self.products else []), *self.keep, *(_OFFLOAD + name for name in self.offload)]
        return ",".join(parts) or "all"

    def policy(self) -> Callable[..., Any]:
        """As `jax.checkpoint` takes it: of each operation, whether its result is kept."""
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[*self.keep, *([PRODUCT] if self.products else [])],
            names_which_can_be_offloaded=list(self.offload),
            offload_src="device",
            offload_dst="pinned_host",
        )


def named(array: Array, name: str) -> Array:
    """An activation under a name that `Remat` can keep it by."""
    assert name in NAMES
    return checkpoint_name(array, name)


def recomputed(function: Callable[..., Any], *, apart: bool = False) -> Callable[..., Any]:
    """`function`, of whose results in between only matrix products are kept, if its gradient needs them: norms and
    activation functions are computed again in the backward pass.

    They take little time, and with attention's scores they were most of what a layer kept: of SmolLM2's 66 kB a token,
    19 are left (LOG.md).

    Args:
      apart: hold the compiler to it. Of layers one by one it sees the same computation twice, keeps the first one's
        result for the second, and an argument that is a sum as its terms.
    """
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def run(*arguments: Any) -> Any:
        # The arguments alone: weights need no copy of their own.
        prevent = (True,) * len(arguments) if apart else False
        return jax.checkpoint(function, prevent_cse=prevent, policy=policy)(*arguments)

    return run
