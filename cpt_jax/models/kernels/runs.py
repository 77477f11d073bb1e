"""Attention under `jax.vmap` over runs: no kernel takes an axis of runs, so that the runs' rows become rows of one call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cpt_jax.models.kernels.visible import Visible

Attention = Callable[[Array, Array, Array, Array | None, Visible], Array]


def rows_of_runs(attention: Attention) -> Attention:
    """As `attention` of arrays [B, ...], and mapped over runs one call of it with [B * runs, ...].

    The backward pass computes the forward pass anew: which axis of what a kernel keeps for it holds the rows is known
    to nobody. `attention` may not close over values that are being traced.
    """
    forward = _mapped(attention)

    def gradients(q, k, v, sinks, visible, cotangent):
        return jax.vjp(lambda q, k, v, sinks: attention(q, k, v, sinks, visible), q, k, v, sinks)[1](cotangent)

    backward = _mapped(gradients)
    whole = jax.custom_vjp(forward)
    whole.defvjp(
        lambda *arrays: (forward(*arrays), arrays), lambda arrays, cotangent: (*backward(*arrays, cotangent), None)
    )
    return whole


def _mapped(function: Callable) -> Callable:
    once = jax.custom_batching.custom_vmap(function)

    @once.def_vmap
    def of_runs(runs: int, mapped: Any, *arguments: Any) -> Any:
        arrays, structure = jax.tree.flatten(arguments)
        rows = [_joined(array, runs, each) for array, each in zip(arrays, jax.tree.leaves(mapped), strict=True)]
        results = function(*jax.tree.unflatten(structure, rows))
        return jax.tree.map(lambda array: _parted(array, runs), results), jax.tree.map(lambda _: True, results)

    return once


def _joined(array: Array, runs: int, mapped: bool) -> Array:
    """[runs, B, ...], or [B, ...] that is the same for all, as [B * runs, ...]: rows in front, which a mesh may cut. A
    number is the same for all runs."""
    if jnp.ndim(array) == 0:
        return array
    rows = (
        jnp.moveaxis(array, 0, 1) if mapped else jnp.broadcast_to(array[:, None], (len(array), runs, *array.shape[1:]))
    )
    return rows.reshape(-1, *rows.shape[2:])


def _parted(array: Array, runs: int) -> Array:
    """[B * runs, ...] as [runs, B, ...]."""
    return jnp.moveaxis(array.reshape(-1, runs, *array.shape[1:]), 1, 0)
