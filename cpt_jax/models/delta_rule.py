"""The gated delta rule (Yang et al. 2024, arXiv 2412.06464), chunk by chunk.

Each head has a state S [k, v], a linear map from keys to values. A token lets it decay, takes out what its key
already gives, and writes its value there:

    S' = exp(g) S,  S = S' + beta k (v - k S')^T,  o = q S.

Within a chunk the tokens' writes depend on each other by a triangular system, which is inverted once; the rest is
matrix products, and only the states go from chunk to chunk one after the other (Yang et al. 2024, arXiv 2406.06484).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cpt_jax.models.kernels.visible import Visible, first_visible, mask
from cpt_jax.models.products import contract, sum_type

CHUNK = 64
State = Float[Array, "B G R k v"]


class _Chunks(NamedTuple):
    """What each chunk is, without the state that it begins with; chunks are the first axis."""

    writes: Float[Array, "N B G R C v"]
    reads_before_write: Float[Array, "N B G R C k"]
    scores: Float[Array, "N B G R C C"]
    queries: Float[Array, "N B G R C k"]
    keys: Float[Array, "N B G R C k"]
    kept: Float[Array, "N B G R"]


def gated_delta_rule(
    q: Float[Array, "B S G k"],
    k: Float[Array, "B S G k"],
    v: Float[Array, "B S G R v"],
    log_decay: Float[Array, "B S G R"],
    beta: Float[Array, "B S G R"],
    visible: Visible,
    dtype: jnp.dtype,
    state: State | None = None,
) -> tuple[Float[Array, "B S G R v"], State]:
    """(each token's o, the state behind the last one): R value heads share a key head. A document begins with a state of
    zeros; products take inputs of `dtype`, all else is float32.

    Args:
      state: of the row's tokens before this call's; see `Visible.index`.
    """
    batch, length, wide = q.shape[0], q.shape[1], sum_type(dtype)
    size = min(CHUNK, 1 << (length - 1).bit_length())
    count = -(-length // size)
    begins, places = first_visible(visible, (None,), batch, length)

    def in_chunks(x: Array, mode: str = "constant") -> Array:
        """[B, S, ...] as [N, B, ..., C] with S last, filled up with tokens that do nothing."""
        filled = jnp.pad(x, ((0, 0), (0, count * size - length), *((0, 0),) * (x.ndim - 2)), mode=mode)
        return jnp.moveaxis(filled.reshape(batch, count, size, *x.shape[2:]), (1, 2), (0, -1))

    q, k, v, log_decay, beta = (in_chunks(x.astype(wide)) for x in (q, k, v, log_decay, beta))
    begins = in_chunks(begins, "edge")
    places = places[0, 0] + jnp.arange(count * size).reshape(count, 1, size)
    chunks = _chunks(q, k, v, log_decay, beta, begins, places, dtype)
    if state is None:
        state = jnp.zeros((batch, *v.shape[2:4], k.shape[3], v.shape[4]), wide)
    state, mixed = jax.lax.scan(lambda state, chunk: _through(state, chunk, dtype), state.astype(wide), chunks)
    mixed = jnp.moveaxis(mixed, (0, -2), (1, 2)).reshape(batch, count * size, *v.shape[2:5])
    return mixed[:, :length], state


def _chunks(q, k, v, log_decay, beta, begins: Int[Array, "N B C"], places: Int[Array, "N 1 C"], dtype) -> _Chunks:
    """All chunks at once. q, k: [N, B, G, k, C]; v: [N, B, G, R, v, C]; the others [N, B, G, R, C]."""
    seen = jax.vmap(lambda first, places: mask(first, places, places[0]))(begins, places)[:, :, None, None]
    goes_on = (begins < places[..., :1])[:, :, None, None]
    passed = jnp.cumsum(log_decay, axis=-1)
    # What is left at token i of what was written at j, and of the state before the chunk.
    between = jnp.exp(jnp.where(seen, passed[..., :, None] - passed[..., None, :], -jnp.inf))
    since = jnp.where(goes_on, jnp.exp(passed), 0)
    keys = jnp.swapaxes(k, -1, -2)[:, :, :, None]
    alike = contract("nbgki,nbgkj->nbgij", k, k, dtype)[:, :, :, None]
    inverse = inverse_of_unit_lower(beta[..., None] * alike * between)
    writes = beta[..., None] * jnp.swapaxes(v, -1, -2)
    reads = (beta * since)[..., None] * keys
    scores = contract("nbgki,nbgkj->nbgij", q, k, dtype)[:, :, :, None] * between
    return _Chunks(
        writes=contract("nbgrij,nbgrjv->nbgriv", inverse, writes, dtype),
        reads_before_write=contract("nbgrij,nbgrjk->nbgrik", inverse, reads, dtype),
        scores=scores,
        queries=since[..., None] * jnp.swapaxes(q, -1, -2)[:, :, :, None],
        keys=between[..., -1, :, None] * keys,
        kept=since[..., -1],
    )


@jax.custom_vjp
def inverse_of_unit_lower(system: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """Of what is below the diagonal, with ones on it; C is a power of two.

    Blocks are inverted in pairs, from single numbers up: forward substitution, as matrix products alone. (A solver of
    the library would not be cut over devices.)
    """
    blocks, corners = system[..., None, :, :], []
    while (half := blocks.shape[-1] // 2) > 0:
        corners.append(blocks[..., half:, :half])
        halves = jnp.stack([blocks[..., :half, :half], blocks[..., half:, half:]], axis=-3)
        blocks = halves.reshape(*system.shape[:-2], -1, half, half)
    inverse = jnp.ones_like(blocks)
    for corner in reversed(corners):
        upper, lower = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        corner = -_exact(_exact(lower, corner), upper)
        above = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1)
        inverse = jnp.concatenate([above, jnp.concatenate([corner, lower], axis=-1)], axis=-2)
    return inverse[..., 0, :, :]


def _exact(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _inverse_forward(system):
    inverse = inverse_of_unit_lower(system)
    return inverse, inverse


def _inverse_backward(inverse, cotangent):
    transposed = jnp.swapaxes(inverse, -1, -2)
    return (jnp.tril(-_exact(_exact(transposed, cotangent), transposed), -1),)


inverse_of_unit_lower.defvjp(_inverse_forward, _inverse_backward)


def _through(state: State, chunk: _Chunks, dtype: jnp.dtype) -> tuple[State, Float[Array, "B G R C v"]]:
    """(the state behind a chunk, what its tokens read)."""
    known = contract("bgrck,bgrkv->bgrcv", chunk.reads_before_write, state, dtype)
    written = chunk.writes - known
    mixed = contract("bgrck,bgrkv->bgrcv", chunk.queries, state, dtype)
    mixed += contract("bgrij,bgrjv->bgriv", chunk.scores, written, dtype)
    added = contract("bgrck,bgrcv->bgrkv", chunk.keys, written, dtype)
    return chunk.kept[..., None, None] * state + added, mixed
