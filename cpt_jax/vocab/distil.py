"""Fitting new rows to what the frozen model does with the old pieces."""

import dataclasses
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import progress
from cpt_jax.core.tree import Tree, flatten, unflatten
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.cross_entropy import TableUse, token_losses
from cpt_jax.models.decoder import abstract_decoder, apply, head_path

# Of documents that rows are fitted on, in tokens.
SHORTEST = 8


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """The base: its configuration (without new rows), its weights on the device, and the type it computes in."""

    config: DecoderConfig
    weights: Tree
    compute_dtype: Any


@dataclasses.dataclass(frozen=True)
class Aligned:
    """A text read twice: student tokens [S] with new pieces, teacher tokens [T] with old ones, and for each student
    token the teacher's place of its end."""

    student: np.ndarray
    teacher: np.ndarray
    ends: np.ndarray


def aligned(ids: Sequence[int], pieces: Sequence[Sequence[int]], first_new: int) -> Aligned:
    """New ids replaced by their old pieces."""
    parts = [[index] if index < first_new else list(pieces[index - first_new]) for index in ids]
    ends = np.cumsum([len(part) for part in parts]) - 1
    return Aligned(np.array(ids), np.array([index for part in parts for index in part]), ends)


def batches(
    documents: Iterable[Sequence[int]], context, batch_size: int, student_length: int, teacher_length: int
) -> Iterator[dict[str, np.ndarray]]:
    """Rows of one text each, cut where either reading is full; positions behind a text's end weigh nothing."""
    rows, start = [], context.base.start_id
    for ids in documents:
        text = aligned([start, *ids], context.pieces, context.base.size)
        count = min(student_length, int(np.searchsorted(text.ends, teacher_length)), len(text.student))
        ends = text.ends[:count]
        row = {
            "student": np.pad(text.student[:count], (0, student_length - count)),
            "teacher": np.pad(text.teacher[: ends[-1] + 1], (0, teacher_length - ends[-1] - 1)),
            "ends": np.pad(ends, (0, student_length - count)),
            "weights": np.pad(np.ones(count, np.float32), (0, student_length - count)),
        }
        rows.append(row)
        if len(rows) == batch_size:
            yield {name: np.stack([row[name] for row in rows]) for name in row}
            rows = []


def distilled_rows(settings, initial: dict[str, np.ndarray], context) -> dict[str, np.ndarray]:
    """The fitted rows of each table; see `init_rows.Distilled`."""
    model: FrozenModel = context.model()
    first_new = context.base.size
    grown = dataclasses.replace(model.config, new_rows=len(context.pieces), layer_loop="scan")
    teacher, student = abstract_decoder(dataclasses.replace(model.config, layer_loop="scan")), abstract_decoder(grown)
    head, dtype, softcap = head_path(grown), jnp.dtype(model.compute_dtype), grown.logit_softcap
    kept = flatten(model.weights)

    def hidden_of(network, weights, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return apply(network, weights, tokens, positions, jnp.ones_like(tokens), compute_dtype=dtype)

    def objective(new, frozen, batch, teacher_hidden, teacher_sums):
        weights = frozen | {f"{name}/new": rows for name, rows in new.items()}
        hidden = hidden_of(student, unflatten(weights), batch["student"])
        goal = jnp.take_along_axis(teacher_hidden, batch["ends"][..., None], axis=1)
        scale = jnp.mean(jnp.square(goal))
        weight = batch["weights"]
        distance = jnp.sum(weight * jnp.mean(jnp.square(hidden - goal), -1)) / (scale * weight.sum())
        # The probability of a new piece against that of its old pieces in a row, from the same beginning.
        logits = jnp.concatenate(
            [
                jnp.matmul(
                    goal[:, :-1].astype(dtype), weights[path].astype(dtype).T, preferred_element_type=jnp.float32
                )
                for path in (f"{head}/base", f"{head}/new")
            ],
            axis=-1,
        )
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        targets = batch["student"][:, 1:]
        given = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], 2)[..., 0]
        ends = jnp.take_along_axis(teacher_sums, batch["ends"], 1)
        is_new = (targets >= first_new) * weight[:, 1:]
        error = jnp.sum(is_new * jnp.abs(given - (ends[:, 1:] - ends[:, :-1]))) / jnp.maximum(is_new.sum(), 1)
        return distance + settings.probability_weight * error, (distance, error)

    def teacher_pass(frozen, batch):
        hidden = hidden_of(teacher, unflatten(frozen), batch["teacher"])
        rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        targets = batch["teacher"][:, 1:].reshape(-1)
        ones = jnp.ones(targets.shape, jnp.float32)
        uses = (TableUse(first_new, False),)
        losses = token_losses(rows, (frozen[f"{head}/base"],), targets, ones, dtype, uses, softcap).nats
        sums = jnp.cumsum(-losses.reshape(batch["teacher"].shape[0], -1), axis=1)
        return hidden, jnp.pad(sums, ((0, 0), (1, 0)))

    # The rate falls linearly to nothing.
    optimizer = optax.adam(optax.linear_schedule(settings.learning_rate, 0.0, settings.steps), b2=0.98)

    @jax.jit
    def step(new, state, frozen, batch):
        hidden, sums = teacher_pass(frozen, batch)
        (_, figures), gradients = jax.value_and_grad(objective, has_aux=True)(new, frozen, batch, hidden, sums)
        # A row that is absent from the batch has a gradient from the softmax alone, some thousand times smaller, which
        # Adam would scale to a full step: it waits for its turn.
        present = (
            jnp.zeros(len(context.pieces), bool)
            .at[batch["student"] - first_new]
            .set(True, mode="drop", wrap_negative_indices=False)
        )
        updates, state = optimizer.update(gradients, state)
        updates = jax.tree.map(lambda update: update * present[:, None], updates)
        return optax.apply_updates(new, updates), state, figures

    # Bound to the weights' device, as what a step gives is: otherwise the second step is compiled anew.
    place = next(iter(kept.values())).sharding
    new: Any = jax.device_put(initial, place)
    state = jax.device_put(optimizer.init(new), place)
    with progress("fit new rows", settings.steps, "steps") as shown:
        for _, batch in zip(range(settings.steps), _endless(settings, context), strict=False):
            new, state, (distance, error) = step(new, state, kept, batch)
            shown.advance(1, hidden_state=float(distance), log_probability=float(error))
    return {name: np.asarray(rows) for name, rows in new.items()}


def _stretch(context) -> float:
    """Old tokens a new token, of some text."""
    sample = [text for _, text in zip(range(200), context.texts(), strict=False)]
    old, new = context.base.encode_documents(sample), context.extended.encode_documents(sample)
    return sum(map(len, old)) / max(1, sum(map(len, new)))


def _endless(settings, context) -> Iterator[dict[str, np.ndarray]]:
    # Multiples of 64, so that few shapes are compiled.
    length = -(-int(settings.sequence_length * _stretch(context) * 1.1) // 64) * 64
    return batches(_documents(context), context, settings.batch_size, settings.sequence_length, length)


def _documents(context) -> Iterator[list[int]]:
    """The texts' tokens, in another order in each pass."""
    texts, generator = list(context.texts()), random.Random(context.seed)
    while True:
        generator.shuffle(texts)
        found = False
        for text in texts:
            (ids,) = context.extended.encode_documents([text])
            if len(ids) >= SHORTEST:
                found = True
                yield ids
        if not found:
            raise UserError(f"no text to fit new rows on: give documents of {SHORTEST} tokens or more")
