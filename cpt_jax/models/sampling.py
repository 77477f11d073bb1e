"""How the next token is chosen from its logits: the likeliest, or one drawn from a part of the distribution."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt

from cpt_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """The likeliest token at temperature 0; otherwise one drawn from softmax(logits / temperature), cut to the `top_k`
    likeliest tokens, and then to the fewest that hold the share `top_p` of what is left (nucleus sampling: Holtzman et
    al. 2019, arXiv 1904.09751). The same `seed` draws the same tokens.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: give 0 (the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: give at least 1, or leave it out to draw from all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: give a share above 0 and up to 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: give 0 to {2**32 - 1}")
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and (value := getattr(self, name)) is not None:
                raise UserError(
                    f"{name} is {value} and temperature 0, which takes the likeliest token alone: give a temperature above 0"
                )


GREEDY = Sampling()


def row_keys(seed: int, rows: UInt[np.ndarray, "B"]) -> Key[Array, "B"]:
    """Each row's random numbers: of the seed and its own number alone."""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(rows))


def filtered(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """The logits that a token is drawn by, in the order of transformers' warpers: temperature, top-k, top-p; -inf
    where a token is cut."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        order = jnp.argsort(logits, axis=-1)
        ascending = jnp.take_along_axis(logits, order, axis=-1)
        below = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
        # The likeliest stays, whatever its share.
        cut = (below <= 1 - sampling.top_p).at[:, -1].set(False)
        logits = jnp.put_along_axis(logits, order, jnp.where(cut, -jnp.inf, ascending), axis=-1, inplace=False)
    return logits


@functools.partial(jax.jit, static_argnames="sampling")
def choose(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], count: Int[Array, ""], sampling: Sampling
) -> Int[Array, "B"]:
    """The next token of each row, of which `count` were chosen before."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    draw = lambda key, row: jax.random.categorical(jax.random.fold_in(key, count), row)  # noqa: E731
    return jax.vmap(draw)(keys, filtered(logits, sampling))
