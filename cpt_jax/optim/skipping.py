"""Steps that are not taken: those whose gradient is not finite, or far larger than usual."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

# The usual norm is the mean over the last 100 steps that were taken, or so (each counts 1%); it means something once
# 20 were.
_WINDOW = 100
_ENOUGH = 20


class SkippingState(NamedTuple):
    """Steps skipped, in all and since the last one that was taken; steps taken, and their gradients' mean norm."""

    total: Int[Array, ""]
    in_a_row: Int[Array, ""]
    taken: Int[Array, ""]
    usual_norm: Float[Array, ""]
    inner_state: Any


def skip_bad_steps(inner: optax.GradientTransformation, above: float | None) -> optax.GradientTransformation:
    """`inner`, except that a step whose gradient's global norm is not finite, or more than `above` times the usual one,
    gives updates of zero and leaves `inner`'s state as it was, bit for bit.

    `optax.apply_if_finite` takes the bad step after so many in a row, and looks at no norm. Here they are counted
    (`skipped`), and the training loop can stop.
    """

    def init(params: Any) -> SkippingState:
        zero = jnp.zeros((), jnp.int32)
        return SkippingState(zero, zero, zero, jnp.zeros((), jnp.float32), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm = optax.tree.norm(updates)
        good = jnp.isfinite(norm)
        if above is not None:
            good &= (state.taken < _ENOUGH) | (norm <= above * state.usual_norm)
        new_updates, new_state = inner.update(updates, state.inner_state, params)
        # Selected, not branched over: a branch would keep old and new state in memory at once.
        inner_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), new_state, state.inner_state)
        taken = state.taken + good
        share = 1 / jnp.clip(taken, 1, _WINDOW)
        usual_norm = jnp.where(good, state.usual_norm + (norm - state.usual_norm) * share, state.usual_norm)
        in_a_row = jnp.where(good, 0, state.in_a_row + 1)
        kept = jax.tree.map(lambda leaf: jnp.where(good, leaf, jnp.zeros_like(leaf)), new_updates)
        return kept, SkippingState(state.total + ~good, in_a_row, taken, usual_norm, inner_state)

    return optax.GradientTransformation(init, update)


def skipped(optimizer_state: Any) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Steps skipped: (in all, in a row up to now); none where nothing is ever skipped."""
    nodes = jax.tree.leaves(optimizer_state, is_leaf=lambda node: isinstance(node, SkippingState))
    for node in nodes:
        if isinstance(node, SkippingState):
            return node.total, node.in_a_row
    return jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
