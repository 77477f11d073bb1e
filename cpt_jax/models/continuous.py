"""Many texts from a few rows: a row whose text has ended takes the next one at once (scheduling by iteration: Yu et al.
2022, Orca), where `Generation` reads its prompts together and waits for the longest text."""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import Tree
from cpt_jax.models.decoder import Network
from cpt_jax.models.generate import read, rounded, turned_otherwise_beyond
from cpt_jax.models.kernels.cached import KeyCache
from cpt_jax.models.sampling import Sampling, choose, row_keys
from cpt_jax.models.stack import Caches, empty_caches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A text to be written after a prompt; its random numbers depend on the seed and on its `number` alone."""

    number: int
    prompt: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """What follows the prompt of a request, and whether it came to an end."""

    request: Request
    tokens: list[int]
    ended: bool


@dataclasses.dataclass
class _Row:
    """What a row writes: its `first` place, the tokens of its prompt that it is still to be given, those it has drawn, and
    how many were asked for, of which the last may not be known yet; and, as soon as it has ended, all that it has `read`."""

    request: Request | None = None
    first: int = 0
    waiting: deque[int] = dataclasses.field(default_factory=deque)
    drawn: list[int] = dataclasses.field(default_factory=list)
    draws: int = 0
    read: list[int] = dataclasses.field(default_factory=list)

    def continues(self, prompt: list[int]) -> bool:
        """Whether a prompt begins with all that the row has read."""
        return 0 < len(self.read) < len(prompt) and prompt[: len(self.read)] == self.read

    def take(self, request: Request, place: int) -> None:
        already = len(self.read) if self.continues(request.prompt) else 0
        self.request, self.waiting = request, deque(request.prompt[already:])
        self.first = self.first if already else place
        self.drawn, self.draws, self.read = [], 0, []

    def end(self, unread: list[int]) -> Request:
        """Gives the request back; `unread`: what was read besides what it has drawn, before it was known."""
        assert self.request is not None
        request, self.request = self.request, None
        self.read = [*request.prompt, *self.drawn, *unread]
        return request


@functools.partial(jax.jit, static_argnames=("network", "sampling", "dtype"), donate_argnames="caches")
def _step(
    weights: Tree,
    chosen: Int[Array, "B"],
    given: Int[Array, "B"],
    first: Int[Array, "B"],
    numbers: Int[Array, "B"],
    counts: Int[Array, "B"],
    caches: Caches,
    index: Int[Array, ""],
    seed: Int[Array, ""],
    network: Network,
    sampling: Sampling,
    dtype: jnp.dtype,
) -> tuple[Int[Array, "B"], Caches]:
    """What each row draws after a token, `given` or (-1) the one that it has drawn last, is read into place `index`."""
    tokens = jnp.where(given < 0, chosen, given)[:, None]
    logits, caches = read(network, weights, tokens, first, caches, index, index, dtype)
    return choose(logits, row_keys(seed, numbers), counts, sampling), caches


@functools.partial(jax.jit, static_argnames="places", donate_argnames="caches")
def _moved(caches: Caches, places: int) -> Caches:
    """Keys and values so many places earlier."""

    def moved(cache: Any) -> Any:
        if not isinstance(cache, KeyCache):
            return cache
        return cache._replace(parts=tuple(jnp.roll(part, -places, axis=-2) for part in cache.parts))

    return jax.tree.map(moved, caches, is_leaf=lambda part: isinstance(part, KeyCache))


class ContinuousGeneration:
    """Texts, given in the order in which they end: after `new_tokens`, or at one of `end_ids` (which is not given).

    All rows write at the same place of the cache, each text from its own first place on; a prompt is read token by token
    while other rows go on drawing. A prompt that begins with all of a text that has just ended (a question, and what leads to
    its answer) goes on in that row, and nothing is read again. While a token is read from the device, the next one is
    being computed there, so that a row gives a token away between two texts.

    Args:
      following: gives the next request, or None where there is none for now: texts that are under way may bring more.
      longest: tokens of a prompt and of what follows it, at most.
      heard: called with the number of tokens that have been drawn.

    Raises:
      UserError: texts may become so long that the model turns all their tokens otherwise (LongRoPE).
    """

    def __init__(
        self,
        network: Network,
        weights: Tree,
        following: Callable[[], Request | None],
        *,
        rows: int,
        longest: int,
        new_tokens: int,
        sampling: Sampling,
        end_ids: Collection[int],
        compute_dtype: Any = "float32",
        heard: Callable[[int], None] = lambda drawn: None,
    ) -> None:
        if (limits := turned_otherwise_beyond(network.config)) and longest > min(limits):
            raise UserError(
                f"texts of {longest:,} tokens may become longer than {min(limits):,}, where this model turns them otherwise "
                "(LongRoPE): ask for fewer tokens"
            )
        self._network, self._weights, self._following = network, weights, following
        self._rows = [_Row() for _ in range(rows)]
        self._longest, self._new_tokens, self._end_ids = longest, new_tokens, frozenset(end_ids)
        self._seed, self._heard, self._drawn = np.uint32(sampling.seed), heard, 0
        # What is compiled does not depend on the seed.
        self._sampling, self._dtype = dataclasses.replace(sampling, seed=0), jnp.dtype(compute_dtype)

    def __iter__(self) -> Iterator[Written]:
        # With a quarter more room than a text needs, the cache is moved once in so many tokens.
        room = rounded(self._longest + self._longest // 4)
        caches = empty_caches(self._network.config, len(self._rows), room, self._dtype)
        chosen, index, drawing = jnp.zeros(len(self._rows), jnp.int32), 0, []
        while True:
            self._take(index)
            known, drew = chosen, drawing
            if any(row.request for row in self._rows):
                if index == room:
                    index = self._longest
                    caches = _moved(caches, room - index)
                    for row in self._rows:
                        row.first -= room - index
                inputs, drawing = self._inputs(index)
                place, how = np.int32(index), (self._network, self._sampling, self._dtype)
                chosen, caches = _step(self._weights, chosen, *inputs, caches, place, self._seed, *how)
                index += 1
            elif drew:
                drawing = []
            else:
                return
            # Read only now that the device has its next work.
            if drew:
                yield from self._known(drew, np.asarray(known).tolist())

    def _take(self, index: int) -> None:
        """Gives rows that are free a text each; one that is none's is nobody's from then on."""
        while (free := [row for row in self._rows if row.request is None]) and (request := self._following()):
            assert len(request.prompt) + self._new_tokens <= self._longest
            row = next((row for row in free if row.continues(request.prompt)), free[0])
            row.take(request, index)
        for row in free:
            row.read = []

    def _inputs(self, index: int) -> tuple[tuple[np.ndarray, ...], list[Request | None]]:
        """What `_step` is given of rows, and whose token each of them draws by it."""
        given, first, counts = (np.zeros(len(self._rows), np.int32) for _ in range(3))
        numbers = np.zeros(len(self._rows), np.uint32)
        drawing: list[Request | None] = [None] * len(self._rows)
        for number, row in enumerate(self._rows):
            first[number] = index if row.request is None else row.first
            if row.request is None:
                continue
            given[number] = row.waiting.popleft() if row.waiting else -1
            if not row.waiting:
                drawing[number], numbers[number], counts[number] = row.request, row.request.number, row.draws
                row.draws += 1
        return (given, first, numbers, counts), drawing

    def _known(self, drew: list[Request | None], tokens: list[int]) -> Iterator[Written]:
        """Texts that end with the tokens that were drawn."""
        for row, request, token in zip(self._rows, drew, tokens, strict=True):
            # A text that ended before has asked for one token more.
            if request is None or request is not row.request:
                continue
            if not (ended := token in self._end_ids):
                row.drawn.append(token)
                self._drawn += 1
                self._heard(self._drawn)
            if ended or len(row.drawn) == self._new_tokens:
                yield Written(request=row.end([token] if ended else []), tokens=row.drawn, ended=ended)
