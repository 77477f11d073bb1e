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
# The vocabulary is summed and searched in blocks of so many tokens.
BLOCK = 128


def row_keys(seed: int | UInt[Array, ""], rows: UInt[np.ndarray, "B"] | UInt[Array, "B"]) -> Key[Array, "B"]:
    """Each row's random numbers: of the seed and its own number alone."""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(rows))


def filtered(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """The logits that a token is drawn by, in the order of transformers' warpers: temperature, top-k, top-p; -inf
    where a token is cut. Of equal ones at the edge all stay. Nothing is sorted: on a CPU that takes longer than the model.
    """
    # The likeliest is 0, whatever it is divided by: near a temperature of 0 others would be infinite beside it.
    least = float(jnp.finfo(logits.dtype).tiny)
    logits = (logits - logits.max(-1, keepdims=True)) / max(sampling.temperature, least)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = jnp.where(logits < _kth_largest(logits, sampling.top_k), -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        weights = _weights(logits)
        logits = jnp.where(weights < _least_of_nucleus(weights, sampling.top_p), -jnp.inf, logits)
    return logits


def _weights(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Softmax times a number of each row's own: the likeliest has 1."""
    return jnp.exp(logits - logits.max(-1, keepdims=True))


def _in_blocks(x: Float[Array, "B V"], filler: float) -> Float[Array, "B n block"]:
    rows, count = x.shape
    return jnp.pad(x, ((0, 0), (0, -count % BLOCK)), constant_values=filler).reshape(rows, -1, BLOCK)


def _kth_largest(logits: Float[Array, "B V"], k: int) -> Float[Array, "B 1"]:
    """It is in one of the k blocks whose largest are largest."""
    blocks = _in_blocks(logits, -jnp.inf)
    if k < blocks.shape[1]:
        _, best = jax.lax.top_k(blocks.max(-1), k)
        logits = jnp.take_along_axis(blocks, best[:, :, None], axis=1).reshape(len(logits), -1)
    return jax.lax.top_k(logits, k)[0][:, -1:]


def _least_of_nucleus(weights: Float[Array, "B V"], share: float) -> Float[Array, "B 1"]:
    """The least weight above which there is less than the share of them all: by bisection of its bits, which are
    ordered as positive numbers are."""
    blocks = _in_blocks(weights, 0.0)
    total = lambda x: x.sum(-1).sum(-1)  # noqa: E731
    wanted = share * total(blocks)

    def half(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        below, least = bounds
        middle = below + (least - below) // 2
        enough = total(jnp.where(blocks > _of_bits(middle)[:, None, None], blocks, 0)) < wanted
        return jnp.where(enough, below, middle), jnp.where(enough, middle, least)

    zeros = jnp.zeros(len(weights), jnp.int32)
    ones = zeros + jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
    # The bits of 1.0 are a number below 2 ** 30.
    _, least = jax.lax.fori_loop(0, 30, half, (zeros, ones))
    return _of_bits(least)[:, None]


def _of_bits(bits: Int[Array, "B"]) -> Float[Array, "B"]:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@functools.partial(jax.jit, static_argnames="sampling")
def choose(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], counts: Int[Array, "B"], sampling: Sampling
) -> Int[Array, "B"]:
    """The next token of each row, of which `counts` were chosen before."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    uniform = jax.vmap(lambda key, count: jax.random.uniform(jax.random.fold_in(key, count), (2,)))(keys, counts)
    # First the block, then the token in it: two numbers a row, where a Gumbel number of each token takes a CPU longer
    # than the model.
    blocks = _in_blocks(_weights(filtered(logits.astype(jnp.float32), sampling)), 0.0)
    block = _drawn(blocks.sum(-1), uniform[:, 0])
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _drawn(within, uniform[:, 1])


def _drawn(weights: Float[Array, "B n"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """The first whose sum with those before is above a share of all; never one without weight."""
    # Sums are rounded each in its own way: one may be above the one before although nothing was added.
    sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0)
    whole = sums.max(-1)
    below = jnp.minimum(uniform * whole, jnp.nextafter(whole, 0))
    return jnp.argmax(sums > below[:, None], axis=-1)
