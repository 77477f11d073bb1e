"""Bits per byte of whole documents: every byte counted once, each document predicted from its start token alone; and
of conversations, over the bytes of their answers."""

import bisect
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.progress import say
from cpt_jax.core.tree import Tree
from cpt_jax.data.chat import ChatEncoder
from cpt_jax.data.sources import Document, SkipCounts, counted
from cpt_jax.evaluate.token_scores import windows_over
from cpt_jax.models.cross_entropy import TableUse, token_losses
from cpt_jax.models.decoder import Network, apply, head_path
from cpt_jax.sharding.placement import spread
from cpt_jax.sharding.rules import RULES, parts
from cpt_jax.vocab.tokenizer import Tokenizer

# A document's bytes by where they are in it: the first 1,024, as many again, twice as many, ...
FIRST_STRETCH, STRETCHES = 1024, 32
_STARTS = np.asarray([0, *(FIRST_STRETCH << number for number in range(STRETCHES - 1))])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """Loss on the bytes from `start` to `end` of documents, each token counted where it begins."""

    start: int
    end: int
    bits_per_byte: float
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Loss on a set of documents. `tokens` and `nats_per_token` are of the model's own tokenizer; bits per byte
    compares."""

    bits_per_byte: float
    nats_per_token: float
    tokens: int
    bytes: int
    by_position: tuple[Stretch, ...] | None = None

    def figures(self) -> dict[str, Any]:
        """For JSON: what was measured."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class _Window:
    """A stretch of a document: `inputs` predict `targets`, each of which counts (1) or does not (0); `stretches`: where
    in the document these are, by number."""

    inputs: list[int]
    targets: list[int]
    weights: np.ndarray
    stretches: np.ndarray | None = None


def _windows(framed: list[int], counted: np.ndarray, length: int, stretches: np.ndarray | None = None) -> list[_Window]:
    """One window for a document of up to `length` predictions; a longer one goes on in windows that see half a window
    of what came before.

    Args:
      framed: tokens [n + 1], each of which predicts the next; counted: which of these n predictions count; stretches: of
        each of these, where it is.
    """
    windows = []
    for end, new in windows_over(len(counted), length):
        first = max(0, end - length)
        weights = np.concatenate([np.zeros(end - first - new), counted[end - new : end]])
        places = None if stretches is None else stretches[first:end]
        windows.append(_Window(framed[first:end], framed[first + 1 : end + 1], weights, places))
    return [window for window in windows if window.weights.any()]


def _rows(windows: Sequence[_Window], length: int) -> dict[str, np.ndarray]:
    """Windows packed whole into rows [n, length], longest first, each into the fullest row that has room."""
    rows: list[list[_Window]] = []
    # (tokens that are free, row) of each row with room, ascending.
    room: list[tuple[int, int]] = []
    for window in sorted(windows, key=lambda window: -len(window.inputs)):
        size = len(window.inputs)
        if (place := bisect.bisect_left(room, (size, 0))) < len(room):
            free, index = room.pop(place)
        else:
            free, index = length, len(rows)
            rows.append([])
        rows[index].append(window)
        if free > size:
            bisect.insort(room, (free - size, index))
    names = ["inputs", "targets", "positions", "segment_ids", "weights"]
    names += ["stretches"] if any(window.stretches is not None for window in windows) else []
    arrays = {name: np.zeros((len(rows), length), np.float32 if name == "weights" else np.int32) for name in names}
    for number, row in enumerate(rows):
        first = 0
        for segment, window in enumerate(row, start=1):
            size = len(window.inputs)
            place = slice(first, first + size)
            arrays["inputs"][number, place] = window.inputs
            arrays["targets"][number, place] = window.targets
            arrays["positions"][number, place] = np.arange(size)
            arrays["segment_ids"][number, place] = segment
            arrays["weights"][number, place] = window.weights
            if window.stretches is not None:
                arrays["stretches"][number, place] = window.stretches
            first += size
    return arrays


@functools.lru_cache(maxsize=8)
def _nats_function(network: Network, compute: str) -> Callable:
    table = head_path(network.config)

    @jax.jit
    def nats(weights: Tree, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
        """(the sum, and the sums of the stretches)."""
        hidden = apply(network, weights, rows["inputs"], rows["positions"], rows["segment_ids"], compute_dtype=compute)
        tables = tuple(weights[table][part] for part in network.config.table_rows)
        none_train = tuple(TableUse(rows, False) for rows in network.config.table_rows.values())
        losses = token_losses(
            hidden,
            tables,
            rows["targets"],
            rows["weights"],
            jnp.dtype(compute),
            none_train,
            network.config.logit_softcap,
        )
        if "stretches" not in rows:
            return losses.total, None
        sums = jnp.zeros(STRETCHES).at[rows["stretches"]].add(rows["weights"] * losses.nats)
        whole = not jax.sharding.get_abstract_mesh().empty
        return losses.total, jax.lax.with_sharding_constraint(sums, PartitionSpec()) if whole else sums

    return nats


@dataclasses.dataclass(frozen=True)
class PackedDocuments:
    """Documents under one tokenizer, ready to be evaluated: rows [n, sequence_length] and what they count; `stretches`:
    the bytes of each, where they are told apart."""

    rows: dict[str, np.ndarray]
    tokens: int
    bytes: int
    stretches: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows["inputs"])


def pack_documents(
    tokenizer: Tokenizer, documents: Sequence[str], sequence_length: int, by_position: bool = False
) -> PackedDocuments:
    """Packs documents (at least one) whole; one longer than `sequence_length` tokens is read in windows that overlap
    by half."""
    sizes = [len(document.encode()) for document in documents]
    if by_position:
        placed = tokenizer.encode_placed(list(documents))
        encoded = [encoding.ids for encoding in placed]
        stretches = [
            _stretches(document, encoding.offsets) for document, encoding in zip(documents, placed, strict=True)
        ]
    else:
        encoded, stretches = tokenizer.encode_documents(list(documents)), [None] * len(documents)
    start = tokenizer.start_id
    windows = [
        window
        for tokens, places in zip(encoded, stretches, strict=True)
        for window in _windows([start, *tokens], np.ones(len(tokens)), sequence_length, places)
    ]
    rows, tokens = _rows(windows, sequence_length), sum(len(ids) for ids in encoded)
    stands_for_any = tokenizer.unknown_id
    if stands_for_any is not None and (unknown := sum(ids.count(stands_for_any) for ids in encoded)):
        say(
            f"evaluation: {unknown:,} of {tokens:,} tokens stand for text that the tokenizer cannot spell ({tokenizer.piece(stands_for_any)}): bits per byte leave out what it is, and are too low"
        )
    held = np.clip(np.asarray(sizes)[:, None] - _STARTS, 0, np.diff(_STARTS, append=1 << 62)).sum(0)
    return PackedDocuments(rows, tokens, sum(sizes), held if by_position else None)


def _stretches(document: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Of each token the number of the stretch in which it begins."""
    before = np.cumsum([0, *(len(character.encode()) for character in document)])
    firsts = np.minimum([first for first, _ in offsets], len(document) - 1).astype(int)
    return np.searchsorted(_STARTS, before[firsts], side="right") - 1


def pack_conversations(encoder: ChatEncoder, documents: Sequence[Document], sequence_length: int) -> PackedDocuments:
    """Packs conversations as `pack_documents` does documents: what is not an assistant's text is read and not counted.

    Raises:
      UserError: none of them can be used.
    """
    skipped = SkipCounts()
    chats = encoder.measured(list(encoder.rendered(documents, skipped)))
    if not any(chat.counted.any() for chat in chats):
        raise UserError(f"none of {len(documents)} conversations to evaluate on can be used: {counted(skipped)}")
    windows = [window for chat in chats for window in _windows(chat.tokens, chat.counted[1:], sequence_length)]
    rows = _rows(windows, sequence_length)
    return PackedDocuments(rows, int(rows["weights"].sum()), sum(chat.bytes for chat in chats))


def bits_per_byte(
    network: Network,
    weights: Tree,
    documents: PackedDocuments,
    *,
    batch_size: int,
    precision: Precision,
    mesh: Mesh | None = None,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> Result:
    """The loss on documents; end tokens are not counted.

    Args:
      weights: on the device, or as the rules put them on `mesh`, in `precision`'s types.
      batch_size: rows at a time; on a mesh, at least one for each part of it that has rows of its own.
      on_progress: called with the number of rows done since the last call.
    """
    function = _nats_function(network, precision.compute)
    total, sums, put = 0.0, np.zeros(STRETCHES), lambda array: array
    if mesh is not None:
        batch_size = -(-batch_size // parts(mesh, "batch")) * parts(mesh, "batch")
        where = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
        put = functools.partial(spread, sharding=where)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for first in range(0, len(documents), batch_size):
            batch = {name: array[first : first + batch_size] for name, array in documents.rows.items()}
            missing = batch_size - len(batch["inputs"])
            # One shape for all: the last batch is filled up with empty rows.
            batch = {name: put(np.pad(array, ((0, missing), (0, 0)))) for name, array in batch.items()}
            found, found_by_position = function(weights, batch)
            total += float(found)
            if found_by_position is not None:
                sums += np.asarray(found_by_position)
            on_progress(batch_size - missing)
    return Result(
        bits_per_byte=total / documents.bytes / math.log(2),
        nats_per_token=total / documents.tokens,
        tokens=documents.tokens,
        bytes=documents.bytes,
        by_position=None if documents.stretches is None else _by_position(sums, documents.stretches),
    )


def _by_position(nats: np.ndarray, sizes: np.ndarray) -> tuple[Stretch, ...]:
    ends = [*_STARTS[1:], int(_STARTS[-1]) * 2]
    return tuple(
        Stretch(start=int(start), end=int(end), bits_per_byte=float(total / size / math.log(2)), bytes=int(size))
        for start, end, total, size in zip(_STARTS, ends, nats, sizes, strict=True)
        if size
    )
