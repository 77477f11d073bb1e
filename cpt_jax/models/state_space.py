"""The state space of Mamba 2 (Dao & Gu 2024, arXiv 2405.21060), chunk by chunk.

Each head has a state S [k, v], a linear map from keys to values. A token lets it decay, adds its value where its key
points, and reads:

    S' = exp(g) S + k v^T,  o = q S'.

(In the paper q is C, k is B, v is x times its step, and g is A times the step.) Within a chunk that is attention whose
scores decay with distance; between chunks only the states go on, one after the other. All else is matrix products.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cpt_jax.models.kernels.visible import Visible, first_visible, mask
from cpt_jax.models.products import contract, sum_type

# On a CPU 32 and 64 are as quick and take more memory (states), 256 takes more of both (scores).
CHUNK = 128
State = Float[Array, "B G k R v"]


def state_space(
    q: Float[Array, "B S G k"],
    k: Float[Array, "B S G k"],
    v: Float[Array, "B S G R v"],
    log_decay: Float[Array, "B S G R"],
    visible: Visible,
    dtype: jnp.dtype,
    state: State | None = None,
) -> tuple[Float[Array, "B S G R v"], State]:
    """(each token's o, the state behind the last one): R heads of a group share its queries and keys. A document begins
    with a state of zeros; products take inputs of `dtype`, all else is float32.

    Of a single token this is the recurrence itself.

    Args:
      state: of the row's tokens before this call's; see `Visible.index`.
    """
    batch, length, wide = q.shape[0], q.shape[1], sum_type(dtype)
    size = min(CHUNK, 1 << (length - 1).bit_length())
    count = -(-length // size)
    begins, places = first_visible(visible, (None,), batch, length)

    def in_chunks(x: Array, mode: str = "constant") -> Array:
        """[B, S, ...] as [N, B, C, ...], filled up with tokens that do nothing."""
        filled = jnp.pad(x, ((0, 0), (0, count * size - length), *((0, 0),) * (x.ndim - 2)), mode=mode)
        return jnp.moveaxis(filled.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    q, k, v = (jnp.moveaxis(in_chunks(x.astype(wide)), 2, 3) for x in (q, k, v))
    passed = jnp.cumsum(jnp.moveaxis(in_chunks(log_decay.astype(wide)), 2, -1), axis=-1)
    begins = in_chunks(begins, "edge")
    places = places[0, 0] + jnp.arange(count * size).reshape(count, 1, size)
    seen = jax.vmap(lambda first, places: mask(first, places, places[0]))(begins, places)[:, :, None, None]
    goes_on = (begins < places[..., :1])[:, :, None, None]
    # What is left at token i of what was written at j, and of the state before the chunk: [N, B, G, R, C, C] and [.., C].
    between = jnp.exp(jnp.where(seen, passed[..., :, None] - passed[..., None, :], -jnp.inf))
    since = jnp.where(goes_on, jnp.exp(passed), 0)

    def of_tokens(x: Float[Array, "N B G R C"]) -> Float[Array, "N B G C R 1"]:
        return jnp.swapaxes(x, -1, -2)[..., None]

    scores = contract("nbgik,nbgjk->nbgij", q, k, dtype)[:, :, :, None] * between
    written = contract("nbgjk,nbgjrv->nbgkrv", k, of_tokens(between[..., -1, :]) * v, dtype)

    def through(state: State, chunk: tuple[Array, Array]) -> tuple[State, State]:
        kept, written = chunk
        return kept[:, :, None, :, None] * state + written, state

    if state is None:
        state = jnp.zeros(written.shape[1:], wide)
    state, before = jax.lax.scan(through, state.astype(wide), (since[..., -1], written))
    mixed = contract("nbgrij,nbgjrv->nbgirv", scores, v, dtype)
    mixed += of_tokens(since) * contract("nbgik,nbgkrv->nbgirv", q, before, dtype)
    mixed = jnp.moveaxis(mixed, (0, 3), (1, 2)).reshape(batch, count * size, *v.shape[2:3], *v.shape[4:])
    return mixed[:, :length], state
