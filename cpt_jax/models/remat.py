"""What the backward pass recomputes instead of keeping (Chen et al. 2016, arXiv 1604.06174)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from cpt_jax.core.errors import UserError

# Activations of a block that can be kept by name: queries, keys and values behind their rotation, what the heads mix,
# and the inner activations of the feed-forward (of experts: none).
NAMES = ("queries", "keys", "values", "attention_out", "mlp_gate", "mlp_up")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remat:
    """Each layer's activations are computed again in the backward pass, except its input and what is named here.

    `products` keeps the outputs of all matrix products with weights; `keep` keeps activations by name, and `offload`
    keeps them in the host's memory (accelerators only): see `NAMES`.
    """

    products: bool = False
    keep: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (*self.keep, *self.offload):
            if name not in NAMES:
                raise UserError(f"remat names the activation {name!r}; there are: {', '.join(NAMES)}")
        if both := set(self.keep) & set(self.offload):
            raise UserError(f"remat both keeps and offloads {', '.join(sorted(both))}: name it once")

    def policy(self) -> Callable[..., Any]:
        """As `jax.checkpoint` takes it: of each operation, whether its result is kept."""
        policies = jax.checkpoint_policies
        by_name = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(self.keep),
            names_which_can_be_offloaded=list(self.offload),
            offload_src="device",
            offload_dst="pinned_host",
        )

        def policy(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
            if self.products and policies.dots_with_no_batch_dims_saveable(primitive, *arguments, **parameters):
                return not _over_a_rank(*arguments, **parameters)
            return by_name(primitive, *arguments, **parameters)

        return policy


def _over_a_rank(a: Any, b: Any, *, dimension_numbers: Any, **_: Any) -> bool:
    """Whether a product sums over next to nothing for what it gives, as an adapter's does: cheap to compute again, and as
    large as that of the weights that it is added to."""
    (contracted, _), _ = dimension_numbers
    summed = math.prod(a.shape[axis] for axis in contracted)
    return 8 * summed <= b.size // summed


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
