"""Next-token cross-entropy over both vocabulary tables, in chunks of tokens.

Logits and their gradient exist for one chunk at a time, and the gradient is computed in the forward pass, while the
chunk's exponentials are at hand: the backward pass only scales it.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK_TOKENS = 512


class TableUse(NamedTuple):
    """Of a vocabulary table: how many of its rows are tokens (those behind them are padding, which is never
    predicted), and whether it trains."""

    rows: int
    trains: bool


def _logits(hidden, table, rows: int, softcap: float | None):
    logits = jnp.matmul(hidden, table.T, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return logits if table.shape[0] == rows else jnp.where(jnp.arange(table.shape[0]) < rows, logits, -jnp.inf)


def _chunk_losses(hidden, tables, targets, uses: tuple[TableUse, ...], softcap: float | None):
    """(losses [N], logits, their exponentials and normaliser) of one chunk of tokens; `tables` are the rows [V_i, D],
    one behind the other."""
    logits = [_logits(hidden, table, use.rows, softcap) for table, use in zip(tables, uses, strict=True)]
    top = functools.reduce(jnp.maximum, [part.max(-1) for part in logits])
    exponentials = [jnp.exp(part - top[:, None]) for part in logits]
    normaliser = sum(part.sum(-1) for part in exponentials)
    first, chosen = 0, jnp.zeros_like(top)
    for part, (rows, _) in zip(logits, uses, strict=True):
        local = jnp.clip(targets - first, 0, rows - 1)
        value = jnp.take_along_axis(part, local[:, None], axis=1)[:, 0]
        chosen = jnp.where((targets >= first) & (targets < first + rows), value, chosen)
        first += rows
    return top + jnp.log(normaliser) - chosen, logits, exponentials, normaliser


def _chunk_gradients(hidden, tables, targets, weights, dtype, uses: tuple[TableUse, ...], softcap: float | None):
    losses, logits, exponentials, normaliser = _chunk_losses(hidden, tables, targets, uses, softcap)
    scale = (weights / normaliser)[:, None]
    dhidden, dtables, first = jnp.zeros(hidden.shape, jnp.float32), [], 0
    for part, capped, table, (rows, wanted) in zip(exponentials, logits, tables, uses, strict=True):
        local = jnp.where(targets < first + rows, targets - first, -1)
        is_target = jnp.arange(table.shape[0])[None, :] == local[:, None]
        dlogits = part * scale - jnp.where(is_target, weights[:, None], 0.0)
        if softcap is not None:
            # Of padded rows the capped logit is -inf, and the gradient 0.
            dlogits *= 1 - jnp.square(jnp.maximum(capped, -softcap) / softcap)
        dlogits = dlogits.astype(dtype)
        dhidden += jnp.matmul(dlogits, table, preferred_element_type=jnp.float32)
        if wanted:
            dtables.append(jnp.matmul(dlogits.T, hidden, preferred_element_type=jnp.float32))
        first += rows
    return losses, dhidden, tuple(dtables)


def _chunks(count: int, *arrays):
    """Arrays [N, ...] as [chunks, size, ...], the last chunk filled up with zeros."""
    size = min(CHUNK_TOKENS, count)
    missing = -count % size
    filled = [jnp.pad(array, ((0, missing),) + ((0, 0),) * (array.ndim - 1)) for array in arrays]
    return [array.reshape(-1, size, *array.shape[1:]) for array in filled]


def token_losses(
    hidden: Float[Array, "N D"],
    tables: tuple[Float[Array, "V D"], ...],
    targets: Int[Array, "N"],
    weights: Float[Array, "N"],
    dtype: Any,
    uses: tuple[TableUse, ...],
    softcap: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, "N"]]:
    """(sum of weight times loss, each token's loss in nats) of the next token over all rows of `tables`.

    Products take inputs of `dtype` and sum in float32. A table that does not train gets a gradient of zero. Only the
    sum has a gradient. `softcap`: logits are softcap * tanh(logits / softcap), as Gemma 2's.
    """
    return cast(tuple[Array, Array], _token_losses(hidden, tables, targets, weights, dtype, uses, softcap))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _token_losses(hidden, tables, targets, weights, dtype, uses, softcap):
    dtype = jnp.dtype(dtype)
    tables = tuple(table.astype(dtype) for table in tables)

    def chunk(arguments):
        return _chunk_losses(arguments[0].astype(dtype), tables, arguments[1], uses, softcap)[0]

    losses = jax.lax.map(chunk, tuple(_chunks(hidden.shape[0], hidden, targets))).reshape(-1)[: hidden.shape[0]]
    return jnp.sum(losses * weights), losses


def _forward(hidden, tables, targets, weights, dtype, uses, softcap):
    dtype = jnp.dtype(dtype)
    low = tuple(table.astype(dtype) for table in tables)

    def chunk(sums, arguments):
        rows, wanted, weight = arguments
        losses, dhidden, dtables = _chunk_gradients(rows.astype(dtype), low, wanted, weight, dtype, uses, softcap)
        return tuple(a + b for a, b in zip(sums, dtables, strict=True)), (losses, dhidden)

    zeros = tuple(jnp.zeros(table.shape, jnp.float32) for table, use in zip(tables, uses, strict=True) if use.trains)
    count = hidden.shape[0]
    sums, (losses, dhidden) = jax.lax.scan(chunk, zeros, tuple(_chunks(count, hidden, targets, weights)))
    losses, dhidden = losses.reshape(-1)[:count], dhidden.reshape(-1, hidden.shape[1])[:count]
    shapes = tuple(jnp.zeros((0,), table.dtype) for table in tables)
    return (jnp.sum(losses * weights), losses), (dhidden, sums, tuple(table.shape for table in tables), shapes)


def _backward(dtype, uses, softcap, residuals, cotangents):
    dhidden, sums, shapes, dtypes = residuals
    cotangent, _ = cotangents
    left = list(sums)
    dtables = tuple(
        (left.pop(0) * cotangent).astype(empty.dtype) if use.trains else jnp.zeros(shape, empty.dtype)
        for use, shape, empty in zip(uses, shapes, dtypes, strict=True)
    )
    return dhidden * cotangent, dtables, None, None


_token_losses.defvjp(_forward, _backward)
