"""Log-likelihoods of texts after texts, summed over a continuation's tokens, and of each token of a text, every one
predicted from all before it."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.tree import Tree
from cpt_jax.models.decoder import Network, apply, logits

# Lengths are filled up to a power of two from here on, so that few shapes are compiled.
SHORTEST = 32
# Logits exist for so many tokens at a time.
CHUNK_TOKENS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenPair:
    """Token ids of a context (at least one) and of what follows it (at least one)."""

    context: list[int]
    continuation: list[int]

    def __post_init__(self) -> None:
        if not self.context or not self.continuation:
            raise UserError("a text to score has no token, or none before it: leave out what is empty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What a model makes of a continuation: its log-likelihood in nats, and whether every token was the likeliest."""

    log_likelihood: float
    greedy: bool


def _filled_length(length: int, max_length: int) -> int:
    return min(max(SHORTEST, 1 << (length - 1).bit_length()), max_length)


def _batches(lengths: Sequence[int], max_length: int, batch_tokens: int) -> Iterator[tuple[int, int, list[int]]]:
    """(length, rows, the indices that are read in them), longest first: time left is then over-estimated, and what
    does not fit in memory fails at once."""
    buckets: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        buckets.setdefault(_filled_length(length, max_length), []).append(index)
    for length in sorted(buckets, reverse=True):
        rows, members = max(1, batch_tokens // length), buckets[length]
        for first in range(0, len(members), rows):
            yield length, rows, members[first : first + rows]


@functools.lru_cache(maxsize=8)
def _score_function(network: Network, compute: str) -> Callable:
    @jax.jit
    def scores(
        weights: Tree, rows: dict[str, Int[Array, "B S"]], places: Int[Array, "N"], count: Int[Array, ""]
    ) -> tuple[Float[Array, "tokens"], Bool[Array, "tokens"]]:
        hidden = apply(network, weights, rows["inputs"], rows["positions"], rows["segment_ids"], compute_dtype=compute)
        hidden, targets = hidden.reshape(-1, hidden.shape[-1]), rows["targets"].reshape(-1)

        # Contexts are long and continuations short: the head, up to a half of a small model, reads these alone.
        def chunk(number, done):
            at = jax.lax.dynamic_slice_in_dim(places, number * CHUNK_TOKENS, CHUNK_TOKENS)
            values, wanted = logits(network, weights, hidden[at], compute_dtype=compute), targets[at]
            chosen = jnp.take_along_axis(values, wanted[:, None], axis=1)[:, 0]
            log_likelihoods = chosen - jax.nn.logsumexp(values, axis=-1)
            return done[0].at[at].set(log_likelihoods), done[1].at[at].set(values.argmax(-1) == wanted)

        nothing = jnp.zeros(targets.shape, jnp.float32), jnp.zeros(targets.shape, bool)
        return jax.lax.fori_loop(0, -(-count // CHUNK_TOKENS), chunk, nothing)

    return scores


def _rows(framed: Sequence[list[int]], counted: Sequence[int], rows: int, length: int):
    """Arrays [rows, length] of token sequences, each but its last token as input, each but its first as target; and
    where the last `counted` targets of each stand, of rows behind one another."""
    arrays = {name: np.zeros((rows, length), np.int32) for name in ("inputs", "targets", "positions", "segment_ids")}
    arrays["positions"][:] = np.arange(length)
    places = []
    for row, (tokens, count) in enumerate(zip(framed, counted, strict=True)):
        size = len(tokens) - 1
        arrays["inputs"][row, :size], arrays["targets"][row, :size] = tokens[:-1], tokens[1:]
        arrays["segment_ids"][row, :size] = 1
        places.append(row * length + np.arange(size - count, size))
    return arrays, places


def _predicted(
    network: Network,
    weights: Tree,
    framed: Sequence[list[int]],
    counted: Sequence[int],
    *,
    max_length: int,
    batch_tokens: int,
    precision: Precision,
    on_progress: Callable[[int], None],
) -> Iterator[tuple[int, Float[np.ndarray, "counted"], Bool[np.ndarray, "counted"]]]:
    """Of each sequence, longest first: its index, and of its last `counted` tokens the log-likelihood and whether it
    was the likeliest."""
    function = _score_function(network, precision.compute)
    for length, rows, members in _batches([len(tokens) - 1 for tokens in framed], max_length, batch_tokens):
        arrays, places = _rows(
            [framed[index] for index in members], [counted[index] for index in members], rows, length
        )
        # One shape for all: places that repeat the first are computed again, to the same end.
        joined = np.concatenate(places)
        filled = np.full(-(-rows * length // CHUNK_TOKENS) * CHUNK_TOKENS, joined[0])
        filled[: len(joined)] = joined
        log_likelihoods, greedy = map(np.asarray, function(weights, arrays, filled, len(joined)))
        for index, at in zip(members, places, strict=True):
            yield index, log_likelihoods[at].astype(np.float64), greedy[at]
        on_progress(len(members))


def score_continuations(
    network: Network,
    weights: Tree,
    pairs: Sequence[TokenPair],
    *,
    max_length: int,
    batch_tokens: int,
    precision: Precision,
    on_progress: Callable[[int], None] = lambda pairs: None,
) -> list[Score]:
    """The score of each continuation after its context, of which the first tokens are left out where both are longer
    than the model reads.

    Args:
      weights: on the device, in `precision`'s types.
      max_length: tokens that the model reads at once.
      batch_tokens: tokens of a batch, in more rows where they are shorter.
      on_progress: called with the number of pairs done since the last call.

    Raises:
      UserError: a continuation alone is longer than `max_length`.
    """
    if (longest := max((len(pair.continuation) for pair in pairs), default=0)) > max_length:
        raise UserError(f"an answer has {longest} tokens and the model reads {max_length}: leave it out")
    framed = [(pair.context + pair.continuation)[-(max_length + 1) :] for pair in pairs]
    counted = [len(pair.continuation) for pair in pairs]
    scores = [Score(log_likelihood=0.0, greedy=True)] * len(pairs)
    for index, log_likelihoods, greedy in _predicted(
        network,
        weights,
        framed,
        counted,
        max_length=max_length,
        batch_tokens=batch_tokens,
        precision=precision,
        on_progress=on_progress,
    ):
        scores[index] = Score(log_likelihood=float(log_likelihoods.sum()), greedy=bool(greedy.all()))
    return scores


def windows_over(predictions: int, max_length: int) -> Iterator[tuple[int, int]]:
    """(end, counted) of the windows over so many predictions, each of which counts once: every window but the first sees
    at least half a window of what came before."""
    end = min(predictions, max_length)
    yield end, end
    while end < predictions:
        step = min(max(1, max_length // 2), predictions - end)
        end += step
        yield end, step


def token_log_likelihoods(
    network: Network,
    weights: Tree,
    sequences: Sequence[list[int]],
    *,
    max_length: int,
    batch_tokens: int,
    precision: Precision,
    on_progress: Callable[[int], None] = lambda windows: None,
) -> list[Float[np.ndarray, "tokens"]]:
    """The log-likelihood in nats of each token of a sequence but the first, which only says where it begins.

    A sequence longer than `max_length` is read in windows that overlap by half; what counts as read before is as in
    `bits_per_byte`.

    Args:
      weights: on the device, in `precision`'s types.
      sequences: token ids, two of them at least, the start token in front.
      max_length: tokens that the model reads at once.
      batch_tokens: tokens of a batch, in more rows where they are shorter.
      on_progress: called with the number of windows done since the last call.

    Raises:
      UserError: a sequence has fewer than two tokens.
    """
    if (shortest := min((len(tokens) for tokens in sequences), default=2)) < 2:
        raise UserError(f"a sequence of {shortest} tokens has none to predict: leave it out")
    places = [
        (number, end, counted)
        for number, tokens in enumerate(sequences)
        for end, counted in windows_over(len(tokens) - 1, max_length)
    ]
    found = [np.zeros(len(tokens) - 1) for tokens in sequences]
    for index, log_likelihoods, _ in _predicted(
        network,
        weights,
        [sequences[number][max(0, end - max_length) : end + 1] for number, end, _ in places],
        [counted for _, _, counted in places],
        max_length=max_length,
        batch_tokens=batch_tokens,
        precision=precision,
        on_progress=on_progress,
    ):
        number, end, counted = places[index]
        found[number][end - counted : end] = log_likelihoods
    return found
