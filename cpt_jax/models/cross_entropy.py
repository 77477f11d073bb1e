"""Losses over the vocabulary, in chunks of tokens: next-token cross-entropy over both tables, with an optional z-loss
and an optional teacher.

Logits and their gradient exist for one chunk at a time, the student's and the teacher's, and the gradient is computed
in the forward pass, while the chunk's exponentials are at hand: the backward pass only scales it.

On a mesh each device takes chunks of its own tokens, and its own rows of a table that is cut (`Devices`): sums over
the vocabulary are added up along the axis that cuts it, the table's gradient along those that cut the tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from cpt_jax.models.cut_vocabulary import Devices, on_mesh
from cpt_jax.models.products import precision_of
from cpt_jax.sharding.hardware import backend

# On a CPU more than this gains nothing. An accelerator adds each chunk's gradient to the whole table's in memory: fewer,
# larger chunks, whose float32 logits still take no more than this.
CHUNK_TOKENS, CHUNK_BYTES = 512, 2**31


class TableUse(NamedTuple):
    """Of a vocabulary table: how many of its rows are tokens (those behind them are padding, which is never
    predicted), and whether it trains."""

    rows: int
    trains: bool


class Teacher(NamedTuple):
    """Whose next-token distribution is to be kept to: KL(teacher || student), weighted token by token.

    Over as many of the student's tables, from the first, as the teacher has: a base without the new rows is compared
    over its own vocabulary, the student's probabilities there renormalised.
    """

    hidden: Float[Array, "*rows D"]
    tables: tuple[Float[Array, "V D"], ...]
    weights: Float[Array, "*rows"]


class Losses(NamedTuple):
    """The sum of all weighted terms, which alone has a gradient; each token's cross-entropy, and its divergence from
    the teacher (0 without one), in nats."""

    total: Float[Array, ""]
    nats: Float[Array, "*rows"]
    divergence: Float[Array, "*rows"]


class _Static(NamedTuple):
    dtype: Any
    uses: tuple[TableUse, ...]
    softcap: float | None
    z_loss: float
    devices: Devices = Devices()


def token_losses(
    hidden: Float[Array, "*rows D"],
    tables: tuple[Float[Array, "V D"], ...],
    targets: Int[Array, "*rows"],
    weights: Float[Array, "*rows"],
    dtype: Any,
    uses: tuple[TableUse, ...],
    softcap: float | None = None,
    *,
    z_loss: float = 0.0,
    teacher: Teacher | None = None,
) -> Losses:
    """Weighted sums over tokens of: cross-entropy of the next token over all rows of `tables`; `z_loss` times the
    squared logarithm of the normaliser (Chowdhery et al. 2022, arXiv 2204.02311); the divergence from a teacher.

    Products take inputs of `dtype` and sum in float32. A table that does not train, and the teacher, get a gradient of
    zero. `softcap`: logits are softcap * tanh(logits / softcap), as Gemma 2's. On a mesh, tokens are to come as rows
    [batch, sequence].
    """
    static = _Static(jnp.dtype(dtype), uses, softcap, z_loss)
    return Losses(*cast(tuple, _token_losses(hidden, tables, targets, weights, teacher, static)))


class _Softmax(NamedTuple):
    """A chunk's distribution over tables: logits by table, their exponentials less the largest, and its logarithm."""

    logits: list[Array]
    exponentials: list[Array]
    normaliser: Array
    log_normaliser: Array


def _softmax(hidden, tables, static: _Static) -> _Softmax:
    logits = []
    for number, (table, (rows, _)) in enumerate(zip(tables, static.uses, strict=False)):
        part = jnp.matmul(hidden, table.T, preferred_element_type=jnp.float32, precision=precision_of(static.dtype))
        if static.softcap is not None:
            part = static.softcap * jnp.tanh(part / static.softcap)
        if table.shape[0] != rows:
            part = jnp.where((static.devices.rows(table, number) < rows)[None], part, -jnp.inf)
        logits.append(part)
    return _normalised(logits, static.devices)


def _normalised(logits: list[Array], devices: Devices) -> _Softmax:
    top = devices.largest([part.max(-1) for part in logits])
    exponentials = [jnp.exp(part - top[:, None]) for part in logits]
    normaliser = devices.sum_of_tables([part.sum(-1) for part in exponentials])
    return _Softmax(logits, exponentials, normaliser, top + jnp.log(normaliser))


def _own_targets(targets, tables, static: _Static):
    """For each table, the targets' places in the part of it that is here [N]; outside of it for others' targets."""
    first, found = 0, []
    for number, (table, (rows, _)) in enumerate(zip(tables, static.uses, strict=True)):
        place = targets - first - static.devices.rows(table, number)[0]
        found.append(jnp.where(targets < first + rows, place, -1))
        first += rows
    return found


def _chosen(logits: Array, own: Array) -> Array:
    """The targets' logits [N], 0 of those that are not here: N numbers are read, where a masked sum would read all."""
    here = (own >= 0) & (own < logits.shape[1])
    found = jnp.take_along_axis(logits, jnp.where(here, own, 0)[:, None], axis=1)[:, 0]
    return jnp.where(here, found, 0.0)


def _chunk_losses(hidden, tables, owned, teacher: Teacher | None, static: _Static):
    """(cross-entropies [N], divergences [N], the student's softmax, the teacher's, the student's over its tables).

    Args:
      owned: the targets, as `_own_targets` gives them.
    """
    student = _softmax(hidden, tables, static)
    chosen = static.devices.sum_of_tables([_chosen(part, own) for part, own in zip(student.logits, owned, strict=True)])
    nats = student.log_normaliser - chosen
    if teacher is None:
        return nats, jnp.zeros_like(nats), student, None, None
    wise = _softmax(teacher.hidden, teacher.tables, static)
    count = len(teacher.tables)
    shared = student if count == len(tables) else _normalised(student.logits[:count], static.devices)
    # sum of p (log p - log q); where p is 0 (padding) both logits are -inf.
    differences = [
        jnp.sum(exponential * jnp.where(exponential > 0, theirs - mine, 0.0), -1)
        for mine, theirs, exponential in zip(shared.logits, wise.logits, wise.exponentials, strict=True)
    ]
    divergence = (
        shared.log_normaliser - wise.log_normaliser + static.devices.sum_of_tables(differences) / wise.normaliser
    )
    return nats, divergence, student, wise, shared


def _chunk_gradients(hidden, tables, targets, weights, teacher: Teacher | None, static: _Static):
    owned = _own_targets(targets, tables, static)
    nats, divergence, student, wise, shared = _chunk_losses(hidden, tables, owned, teacher, static)
    z = static.z_loss * weights
    total = jnp.sum(weights * nats + z * jnp.square(student.log_normaliser))
    of_student = (weights + 2 * z * student.log_normaliser) / student.normaliser
    dhidden, dtables = [], []
    for number, (table, own, use) in enumerate(zip(tables, owned, static.uses, strict=True)):
        mask = jnp.arange(table.shape[0])[None, :] == own[:, None]
        dlogits = student.exponentials[number] * of_student[:, None] - jnp.where(mask, weights[:, None], 0.0)
        if teacher is not None and wise is not None and shared is not None and number < len(teacher.tables):
            dlogits += shared.exponentials[number] * (teacher.weights / shared.normaliser)[:, None]
            dlogits -= wise.exponentials[number] * (teacher.weights / wise.normaliser)[:, None]
        if static.softcap is not None:
            # Of padded rows the capped logit is -inf, and the gradient 0.
            capped = jnp.maximum(student.logits[number], -static.softcap)
            dlogits *= 1 - jnp.square(capped / static.softcap)
        dlogits = dlogits.astype(static.dtype)
        dhidden.append(
            jnp.matmul(dlogits, table, preferred_element_type=jnp.float32, precision=precision_of(static.dtype))
        )
        if use.trains:
            dtables.append(
                jnp.matmul(dlogits.T, hidden, preferred_element_type=jnp.float32, precision=precision_of(static.dtype))
            )
    if teacher is not None:
        total += jnp.sum(teacher.weights * divergence)
    return (total, *dtables), (nats, divergence, static.devices.sum_of_tables(dhidden))


def chunk_tokens(vocabulary: int) -> int:
    """How many tokens a chunk has at most, on this machine."""
    if backend() == "cpu":
        return CHUNK_TOKENS
    return CHUNK_TOKENS * max(CHUNK_BYTES // (4 * vocabulary * CHUNK_TOKENS), 1)


def _chunks(count: int, vocabulary: int, rows: Any) -> Any:
    """Arrays [N, ...] as [chunks, size, ...], the last chunk filled up with zeros."""
    size = min(chunk_tokens(vocabulary), count)
    missing = -count % size

    def cut(array: Array) -> Array:
        filled = jnp.pad(array, ((0, missing),) + ((0, 0),) * (array.ndim - 1))
        return filled.reshape(-1, size, *array.shape[1:])

    return jax.tree.map(cut, rows)


def _height(tables: tuple[Array, ...]) -> int:
    return sum(table.shape[0] for table in tables)


def _low(teacher: Teacher | None, dtype: Any) -> Teacher | None:
    if teacher is None:
        return None
    tables = tuple(table.astype(dtype) for table in teacher.tables)
    return Teacher(teacher.hidden.astype(dtype), tables, teacher.weights)


def _by_token(teacher: Teacher | None) -> Any:
    return None if teacher is None else (teacher.hidden, teacher.weights)


def _with_tables(of_chunk: Any, teacher: Teacher | None) -> Teacher | None:
    return None if teacher is None else Teacher(of_chunk[0], teacher.tables, of_chunk[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _token_losses(hidden, tables, targets, weights, teacher, static: _Static):
    return _on_devices(_values, hidden, tables, targets, weights, teacher, static)


def _values(hidden, tables, targets, weights, teacher, static: _Static):
    """A device's total, and each of its tokens' losses."""
    rows, hidden, targets, weights, teacher = _flat(hidden, targets, weights, teacher)

    def chunk(arguments):
        part, wanted, of_teacher = arguments
        owned, of_teacher = _own_targets(wanted, tables, static), _with_tables(of_teacher, teacher)
        found = _chunk_losses(part.astype(static.dtype), tables, owned, of_teacher, static)
        return found[0], found[1], found[2].log_normaliser

    found = jax.lax.map(chunk, _chunks(len(targets), _height(tables), (hidden, targets, _by_token(teacher))))
    nats, divergence, log_normaliser = (part.reshape(-1)[: len(targets)] for part in found)
    total = jnp.sum(weights * (nats + static.z_loss * jnp.square(log_normaliser)))
    if teacher is not None:
        total += jnp.sum(teacher.weights * divergence)
    return static.devices.sum_of_tokens(total), nats.reshape(rows), divergence.reshape(rows)


def _forward(hidden, tables, targets, weights, teacher, static: _Static):
    found = _on_devices(_with_gradients, hidden, tables, targets, weights, teacher, static)
    shapes = tuple(table.shape for table in tables)
    types = tuple(jnp.zeros((0,), table.dtype) for table in tables)
    return found[:3], (found[3], found[4:], shapes, types)


def _with_gradients(hidden, tables, targets, weights, teacher, static: _Static):
    """As `_values`, and the gradients of the hidden states and of the tables that train."""
    rows, hidden, targets, weights, teacher = _flat(hidden, targets, weights, teacher)
    count = len(targets)

    def chunk(sums, arguments):
        part, wanted, weight, of_teacher = arguments
        of_teacher = _with_tables(of_teacher, teacher)
        parts, by_token = _chunk_gradients(part.astype(static.dtype), tables, wanted, weight, of_teacher, static)
        return tuple(a + b for a, b in zip(sums, parts, strict=True)), by_token

    trained = [table for table, use in zip(tables, static.uses, strict=True) if use.trains]
    zeros = (jnp.zeros(()), *(jnp.zeros(table.shape, jnp.float32) for table in trained))
    chunks = _chunks(count, _height(tables), (hidden, targets, weights, _by_token(teacher)))
    (total, *sums), (nats, divergence, dhidden) = jax.lax.scan(chunk, zeros, chunks)
    nats, divergence = (part.reshape(-1)[:count].reshape(rows) for part in (nats, divergence))
    dhidden = dhidden.reshape(-1, hidden.shape[1])[:count].reshape(*rows, -1)
    dtables = [static.devices.table_gradient(part) for part in sums]
    return static.devices.sum_of_tokens(total), nats, divergence, dhidden, *dtables


def _flat(hidden, targets, weights, teacher: Teacher | None):
    """(the tokens' shape, everything with the tokens as one axis)."""
    if teacher is not None:
        teacher = teacher._replace(
            hidden=teacher.hidden.reshape(-1, hidden.shape[-1]), weights=teacher.weights.reshape(-1)
        )
    return targets.shape, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1), teacher


def _on_devices(function: Callable, hidden, tables, targets, weights, teacher: Teacher | None, static: _Static):
    """What `function` makes of the tables in the type of the products, by each device of a mesh on its own part."""
    tables, teacher = tuple(table.astype(static.dtype) for table in tables), _low(teacher, static.dtype)
    if (found := on_mesh(hidden, tables)) is None:
        return function(hidden, tables, targets, weights, teacher, static)
    devices, specs = found
    outputs: list[Any] = [PartitionSpec(), specs.tokens, specs.tokens]
    if function is _with_gradients:
        trained = [spec for spec, use in zip(specs.gradients, static.uses, strict=True) if use.trains]
        outputs += [specs.hidden, *trained]
    taught: Any = None if teacher is None else (specs.hidden, specs.tables[: len(teacher.tables)], specs.tokens)
    return jax.shard_map(
        functools.partial(function, static=static._replace(devices=devices)),
        in_specs=(specs.hidden, specs.tables, specs.tokens, specs.tokens, taught and Teacher(*taught)),
        out_specs=tuple(outputs),
        check_vma=False,
    )(hidden, tables, targets, weights, teacher)


def _backward(static: _Static, residuals, cotangents):
    dhidden, sums, shapes, types = residuals
    cotangent, left = cotangents[0], list(sums)
    dtables = tuple(
        (left.pop(0) * cotangent).astype(empty.dtype) if use.trains else jnp.zeros(shape, empty.dtype)
        for use, shape, empty in zip(static.uses, shapes, types, strict=True)
    )
    return dhidden * cotangent, dtables, None, None, None


_token_losses.defvjp(_forward, _backward)
