"""Attention in blocks of queries and keys, in plain JAX: the scores of one block exist at a time, and blocks without a
visible key are not computed (FlashAttention-2: Dao 2023, arXiv 2307.08691).

The other half of a causal row, other documents and what lies before the window are skipped while it runs, so that rows
of short documents cost less. The backward pass computes a block's probabilities anew from the logarithm of its
queries' sums.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cpt_jax.models.kernels.visible import SAVED, Visible, first_visible, mask
from cpt_jax.models.products import precision_of, sum_type
from cpt_jax.sharding.hardware import backend

# Forward and backward of SmolLM2's heads on two CPU cores, 1,024 tokens: 49 ms with blocks of 64, 48 with 128, 47 with
# 256, 84 with 512; in packed rows the smaller ones skip more (20, 27, 34, 84). An accelerator wants fewer steps.
CPU_BLOCK, BLOCK = 128, 512


class _Options(NamedTuple):
    block: int
    softcap: float | None
    dtype: jnp.dtype


def blocks(
    q: Float[Array, "B H S h"],
    k: Float[Array, "B G S h"],
    v: Float[Array, "B G S v"],
    visible: Visible,
    windows: Sequence[int | None],
    softcap: float | None,
    dtype: jnp.dtype,
    sinks: Float[Array, "B H"] | None = None,
) -> Float[Array, "B H S v"]:
    """As `reference`. The row is filled up to whole blocks with queries that see what nobody reads; where the queries
    are a part of it, they are whole blocks."""
    batch, heads, length, head_dim = q.shape
    block = block_size()
    first, _ = first_visible(visible, windows, batch, length)
    assert k.shape[2] == length or length % block == 0
    if filled := -length % block:
        q, k, v = (jnp.pad(each, ((0, 0), (0, 0), (0, filled), (0, 0))) for each in (q, k, v))
        own = jnp.broadcast_to(jnp.arange(length, length + filled, dtype=first.dtype)[None], (batch, filled))
        first = jnp.concatenate([first, own], axis=1)
    q = q.reshape(batch, k.shape[1], heads // k.shape[1], length + filled, head_dim)
    begin = jnp.asarray(visible.index, jnp.int32) // block
    if sinks is not None:
        sinks = sinks.reshape(*q.shape[:3], 1, 1)
    mixed = cast(Array, _attend(q, k, v, sinks, first, begin, _Options(block, softcap, dtype)))
    return mixed.reshape(batch, heads, length + filled, v.shape[-1])[:, :, :length]


def block_size() -> int:
    return CPU_BLOCK if backend() == "cpu" else BLOCK


def _split(x: Array, axis: int, block: int) -> Array:
    """Blocks of an axis as the first axis."""
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _joined(x: Array) -> Array:
    """Blocks of queries [n, B, G, r, block, h] as rows [B, G, r, S, h]."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _product(spec: str, a: Array, b: Array, options: _Options) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=sum_type(options.dtype), precision=precision_of(options.dtype))


def _keys(x: Float[Array, "B G S h"], j: Array, options: _Options) -> Float[Array, "B G block h"]:
    return jax.lax.dynamic_slice_in_dim(x, j * options.block, options.block, axis=2)


def _scores(q: Array, k: Array, first: Int[Array, "B block"], i: Array, j: Array, options: _Options):
    """(capped scores [B, G, r, block, block] of query block i and key block j, which of them count)."""
    scores, within = _product("bgrsh,bgkh->bgrsk", q, k, options), jnp.arange(options.block)
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    seen = mask(first, (i * options.block + within)[None], j * options.block + within)
    return scores, seen[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, sinks, first, begin, options):
    """`begin`: the number of the first block of queries."""
    return _forward(q, k, v, sinks, first, begin, options)[0]


def _forward(
    q: Float[Array, "B G r S h"],
    k: Float[Array, "B G K h"],
    v,
    sinks: Float[Array, "B G r 1 1"] | None,
    first: Int[Array, "B S"],
    begin,
    options: _Options,
):
    q, k, v = (each.astype(options.dtype) for each in (q, k, v))
    queries, firsts = _split(q, 3, options.block), _split(first, 1, options.block)

    def query_block(_, inputs):
        i, q, first = inputs

        def key_block(j, carry):
            mixed, largest, total = carry
            scores, seen = _scores(q, _keys(k, j, options), first, i, j, options)
            scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
            now_largest = jnp.maximum(largest, scores.max(-1, keepdims=True))
            weights, shrunk = jnp.exp(scores - now_largest), jnp.exp(largest - now_largest)
            part = _product("bgrsk,bgkh->bgrsh", weights.astype(options.dtype), _keys(v, j, options), options)
            return mixed * shrunk + part, now_largest, total * shrunk + weights.sum(-1, keepdims=True)

        zeros = jnp.zeros((*q.shape[:-1], v.shape[-1]), sum_type(options.dtype))
        if sinks is None:
            start = (zeros, jnp.full_like(zeros[..., :1], jnp.finfo(zeros.dtype).min), zeros[..., :1])
        else:
            start = (zeros, jnp.broadcast_to(sinks, zeros[..., :1].shape), jnp.ones_like(zeros[..., :1]))
        mixed, largest, total = jax.lax.fori_loop(first.min() // options.block, i + 1, key_block, start)
        return None, (mixed / total, largest + jnp.log(total))

    _, (mixed, sums) = jax.lax.scan(query_block, None, (begin + jnp.arange(len(queries)), queries, firsts))
    mixed, sums = checkpoint_name(_joined(mixed), SAVED), checkpoint_name(sums, SAVED)
    return mixed, (queries, k, v, sinks, firsts, begin, mixed, sums)


def _backward(options: _Options, residuals: Any, cotangent: Float[Array, "B G r S v"]):
    queries, k, v, sinks, firsts, begin, mixed, sums = residuals
    # sum(p * dp) of each query, from its output.
    deltas = _split((cotangent * mixed).sum(-1, keepdims=True), 3, options.block)
    # Of a sink p is what the keys leave, and dp is 0. Blocks of queries are the first axis.
    dsinks = None if sinks is None else -(jnp.exp(sinks[None] - sums) * deltas).sum(0).sum(-2, keepdims=True)
    cotangents = _split(cotangent.astype(options.dtype), 3, options.block)

    def query_block(carry, inputs):
        i, q, first, low, logsum, delta = inputs

        def key_block(j, carry):
            dq, dk, dv = carry
            keys, values = _keys(k, j, options), _keys(v, j, options)
            scores, seen = _scores(q, keys, first, i, j, options)
            weights = jnp.where(seen, jnp.exp(scores - logsum), 0)
            dscores = weights * (_product("bgrsh,bgkh->bgrsk", low, values, options) - delta)
            if options.softcap is not None:
                dscores = dscores * (1 - (scores / options.softcap) ** 2)
            dscores, weights = dscores.astype(options.dtype), weights.astype(options.dtype)
            dq = dq + _product("bgrsk,bgkh->bgrsh", dscores, keys, options)
            dk = _added(dk, j, _product("bgrsk,bgrsh->bgkh", dscores, q, options), options)
            dv = _added(dv, j, _product("bgrsk,bgrsh->bgkh", weights, low, options), options)
            return dq, dk, dv

        dq = jnp.zeros(q.shape, sum_type(options.dtype))
        dq, *carry = jax.lax.fori_loop(first.min() // options.block, i + 1, key_block, (dq, *carry))
        return tuple(carry), dq

    zeros = tuple(jnp.zeros(each.shape, sum_type(options.dtype)) for each in (k, v))
    inputs = (begin + jnp.arange(len(queries)), queries, firsts, cotangents, sums, deltas)
    (dk, dv), dq = jax.lax.scan(query_block, zeros, inputs)
    return _joined(dq), dk, dv, dsinks, None, None


def _added(whole: Float[Array, "B G S h"], j: Array, part: Float[Array, "B G block h"], options: _Options) -> Array:
    """The sum with a block's part, in place."""
    return jax.lax.dynamic_update_slice_in_dim(whole, _keys(whole, j, options) + part, j * options.block, axis=2)


_attend.defvjp(_forward, _backward)
