"""Text, token by token, with a key-value cache: prompts of different lengths together."""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import Tree
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.decoder import Network
from cpt_jax.models.kernels.visible import Visible
from cpt_jax.models.rope import LongRoPE
from cpt_jax.models.sampling import GREEDY, Sampling, choose, row_keys
from cpt_jax.models.stack import Caches, empty_caches

SHORTEST, SHORTEST_PROMPT = 64, 16


def rounded(length: int) -> int:
    """A length filled up, so that few are compiled: to an eighth of the next power of two, and to 64 at least."""
    multiple = max(SHORTEST, (1 << (length - 1).bit_length()) // 8)
    return -(-length // multiple) * multiple


def _rounded_prompt(length: int) -> int:
    """That of a prompt, all of which is read: a short one would wait for 64 tokens, as long as for some 20 of its own."""
    return rounded(length) if length > SHORTEST else max(SHORTEST_PROMPT, 1 << (length - 1).bit_length())


class _Functions(NamedTuple):
    """The compiled halves of generation; both give the logits that follow, and the cache."""

    read_prompts: Any
    read_tokens: Any


def read(
    network: Network,
    weights: Tree,
    tokens: Int[Array, "B S"],
    first: Int[Array, "B"],
    caches: Caches,
    index: Int[Array, ""],
    last: Int[Array, ""],
    dtype: jnp.dtype,
) -> tuple[Float[Array, "B V"], Caches]:
    """Reads tokens into the places from `index` on; the logits are those after the one in place `last`.

    Rows end at the same place, so that one index serves all, and begin at their own: `first` is the place of each one's
    first token. Places before it are never seen, and windows, which count places, are each row's own.
    """
    places = index + jnp.arange(tokens.shape[1])
    positions = jnp.maximum(places[None] - first[:, None], 0)
    visible = Visible(jnp.broadcast_to(first[:, None], tokens.shape), index=index)
    lengths = jnp.broadcast_to((last + 1 - first)[:, None], tokens.shape)
    module = network.module(weights)
    outputs = module(tokens, positions, visible, dtype, lengths=lengths, caches=caches)
    hidden = jax.lax.dynamic_index_in_dim(outputs.hidden, last - index, axis=1, keepdims=False)
    return module.logits(hidden, dtype), cast(Caches, outputs.caches)


@functools.lru_cache(maxsize=8)
def _functions(network: Network, dtype: jnp.dtype) -> _Functions:
    @functools.partial(jax.jit, static_argnames="length")
    def read_prompts(weights: Tree, tokens, first, last, length: int):
        caches = empty_caches(network.config, tokens.shape[0], length, dtype)
        return read(network, weights, tokens, first, caches, jnp.int32(0), last, dtype)

    @functools.partial(jax.jit, donate_argnames="caches")
    def read_tokens(weights: Tree, tokens, first, caches: Caches, index):
        return read(network, weights, tokens[:, None], first, caches, index, index, dtype)

    return _Functions(read_prompts, read_tokens)


def turned_otherwise_beyond(config: DecoderConfig) -> list[int]:
    """Lengths beyond which all of a text's tokens are turned otherwise than in a shorter one (LongRoPE)."""
    scalings = [rope.scaling for rope in config.ropes]
    return [scaling.original_length for scaling in scalings if isinstance(scaling, LongRoPE)]


def check_room(config: DecoderConfig, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Raises UserError when a prompt is empty, or leaves no room in the model's context."""
    if new_tokens < 1:
        raise UserError(f"new tokens are {new_tokens}: give at least 1")
    limit = config.context_length
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise UserError(f"prompt {number} is empty: give at least one token")
        if len(prompt) + new_tokens > limit:
            room = limit - len(prompt)
            raise UserError(
                f"the {len(prompt)} tokens of prompt {number} and {new_tokens} new ones do not fit in the model's context of {limit}: "
                f"shorten the prompt{f', or ask for {room} new tokens at most' if room > 0 else ''}"
            )


class Generation:
    """The continuation of several prompts, read together; iterated once, it gives (row, token) as tokens come.

    A row ends after `new_tokens`, at one of `end_ids` (which is not given), or when it is stopped. Rows do not see each
    other, and a row's random numbers depend on the seed and on its number in `numbers` (default: 0, 1, ...) alone.
    While a token is read from the device, the next one is being computed there.

    Rotations that depend on a text's length go by each row's own length so far. With LongRoPE, a row that grows past
    the original length is read anew with the long factors, as transformers does for Phi-3; with DynamicNTK, keys stay
    as they were when they were written, as in transformers.

    Raises:
      UserError: an empty prompt, or one that leaves no room in the model's context.
    """

    def __init__(
        self,
        network: Network,
        weights: Tree,
        prompts: Sequence[Sequence[int]],
        *,
        new_tokens: int,
        sampling: Sampling = GREEDY,
        end_ids: Collection[int] = (),
        numbers: Sequence[int] | None = None,
        compute_dtype: Any = "float32",
    ) -> None:
        check_room(network.config, prompts, new_tokens)
        self._network, self._weights, self._prompts, self._new_tokens = network, weights, prompts, new_tokens
        # What is compiled does not depend on the seed.
        self._sampling, self._seed = dataclasses.replace(sampling, seed=0), sampling.seed
        self._end_ids = frozenset(end_ids)
        self._numbers = range(len(prompts)) if numbers is None else numbers
        self._functions = _functions(network, jnp.dtype(compute_dtype))
        self._live = set(range(len(prompts)))

    def stop(self, row: int) -> None:
        """Ends a row: nothing more comes from it."""
        self._live.discard(row)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if not self._prompts:
            return
        read_prompts, read_tokens = self._functions
        tokens, first, keys = self._inputs()
        width = tokens.shape[1]
        length = rounded(width + self._new_tokens)
        logits, caches = read_prompts(self._weights, tokens, first, np.int32(width - 1), length)
        chosen = [choose(logits, keys, np.zeros(len(first), np.int32), self._sampling)]
        for count in range(1, self._new_tokens + 1):
            if count < self._new_tokens:
                index = np.int32(width + count - 1)
                if self._crosses(index + 1 - first):
                    # Filled up on the left, as prompts are: what layers keep that do not attend ends with the last token.
                    missing = rounded(width + count) - (width + count)
                    tokens, first, width = np.pad(tokens, ((0, 0), (missing, 0))), first + missing, width + missing
                    so_far, index = np.concatenate([tokens, np.stack(chosen, axis=1)], axis=1), index + missing
                    length = rounded(width + self._new_tokens)
                    logits, caches = read_prompts(self._weights, so_far, first, np.int32(index), length)
                else:
                    logits, caches = read_tokens(self._weights, chosen[-1], first, caches, index)
                chosen.append(choose(logits, keys, np.full(len(first), count, np.int32), self._sampling))
            # Read only now that the device has its next work.
            yield from self._given(np.asarray(chosen[count - 1]).tolist())
            if not self._live:
                return

    def _given(self, tokens: list[int]) -> Iterator[tuple[int, int]]:
        """The tokens of the rows that have not ended, this token included."""
        for row, token in enumerate(tokens):
            if row in self._live and token in self._end_ids:
                self.stop(row)
            elif row in self._live:
                yield row, token

    def _inputs(self) -> tuple[np.ndarray, np.ndarray, Array]:
        """(tokens [B, S], filled on the left; the place of each row's first; random keys). The number of rows is
        filled up to a power of two with rows that nobody sees."""
        rows = 1 << (len(self._prompts) - 1).bit_length()
        width = _rounded_prompt(max(map(len, self._prompts)))
        tokens, first = np.zeros((rows, width), np.int32), np.full(rows, width - 1, np.int32)
        for row, prompt in enumerate(self._prompts):
            first[row] = width - len(prompt)
            tokens[row, first[row] :] = prompt
        numbers = np.zeros(rows, np.uint32)
        numbers[: len(self._prompts)] = self._numbers
        return tokens, first, row_keys(self._seed, numbers)

    def _crosses(self, lengths: np.ndarray) -> bool:
        """Whether a row has just grown past the length from which all its tokens are turned otherwise."""
        limits = turned_otherwise_beyond(self._network.config)
        return any(lengths[row] == limit + 1 for row in self._live for limit in limits)


def generate(
    network: Network,
    weights: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    sampling: Sampling = GREEDY,
    end_ids: Collection[int] = (),
    compute_dtype: Any = "float32",
) -> list[list[int]]:
    """The tokens that follow each prompt, all read together: see `Generation`.

    Raises:
      UserError: an empty prompt, or one that leaves no room in the model's context.
    """
    produced: list[list[int]] = [[] for _ in prompts]
    generation = Generation(
        network,
        weights,
        prompts,
        new_tokens=new_tokens,
        sampling=sampling,
        end_ids=end_ids,
        compute_dtype=compute_dtype,
    )
    for row, token in generation:
        produced[row].append(token)
    return produced
