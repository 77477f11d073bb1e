"""The pieces of a tokenizer trained on the new text alone, as far as the base has not got them."""

import collections
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import tokenizers

from cpt_jax.vocab.continued import NewPiece, adjacent
from cpt_jax.vocab.segmentation import ByteLevel
from cpt_jax.vocab.selection import Selection
from cpt_jax.vocab.sentencepiece_model import BPE, NORMAL, SPACE, ModelProto, all_splits, processor, train
from cpt_jax.vocab.tokenizer import Tokenizer


def byte_level_union(
    base: Tokenizer, selection: Selection, texts: Sequence[str], protected: Iterable[str]
) -> Iterator[NewPiece]:
    """Each piece of the domain's own BPE with the merges that make it from what stands there without it."""
    domain = tokenizers.Tokenizer(tokenizers.models.BPE())
    domain.pre_tokenizer = base.backend.pre_tokenizer  # type: ignore[assignment]
    if base.backend.normalizer is not None:
        domain.normalizer = base.backend.normalizer  # type: ignore[assignment]
    trainer = tokenizers.trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=256 + 4 * selection.new_tokens + 4000,
        min_frequency=selection.min_frequency,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    domain.train_from_iterator(texts, trainer)
    kind = ByteLevel(base)
    untouchable, _ = adjacent(kind, protected)
    old = {(kind.pieces[left], kind.pieces[right]) for left, right in untouchable if left in kind.pieces}
    ranks = {pair: rank for rank, pair in enumerate(base.merges)}
    known = set(kind.ids)
    wanted = [left + right for left, right in json.loads(domain.to_str())["model"]["merges"]]
    trained, count = set(wanted), 0

    def free(pair: tuple[str, str]) -> bool:
        piece = pair[0] + pair[1]
        return piece not in known and pair not in old and selection.allows(kind.text(piece), kind.special)

    for piece in wanted:
        if kind.characters(piece) > selection.max_piece_characters or not selection.allows(
            kind.text(piece), kind.special
        ):
            continue
        tokens = [] if piece in known else segment(piece, ranks)
        # What the domain's own tokenizer merges on the way may be protected: then another way leads there, by pieces
        # that it has too, if there are any.
        while len(tokens) > 1 and count < selection.new_tokens:
            pairs = [pair for pair in itertools.pairwise(tokens) if free(pair)]
            if not pairs:
                break
            pair = min(pairs, key=lambda pair: pair[0] + pair[1] not in trained)
            known.add(pair[0] + pair[1])
            ranks[pair] = len(ranks)
            count += 1
            yield NewPiece(pair[0] + pair[1], pair)
            tokens = segment(piece, ranks)


def segment(piece: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """A word in inner spelling under merges with these ranks."""
    *_, parts = merge_steps(piece, ranks)
    return parts


def merge_steps(piece: str, ranks: Mapping[tuple[str, str], float]) -> Iterator[list[str]]:
    """A word's parts before the first merge, and after each."""
    parts = list(piece)
    yield parts
    while len(parts) > 1:
        best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, math.inf))
        if best not in ranks:
            break
        index, merged = 0, []
        while index < len(parts):
            if tuple(parts[index : index + 2]) == best:
                merged.append(best[0] + best[1])
                index += 2
            else:
                merged.append(parts[index])
                index += 1
        parts = merged
        yield parts


def sentencepiece_union(base: Tokenizer, selection: Selection, texts: Sequence[str]) -> list[tuple[str, float]]:
    """(piece, the domain's own score) of the new pieces, the best first, each behind the characters it is made of.

    SentencePiece merges characters that are no pieces themselves; tokenizer.json cannot.
    """
    vocabulary = base.document["model"]["vocab"]
    known = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    special = [token["content"] for token in base.document["added_tokens"] if token["special"]]
    domain = train(base.sentencepiece, texts, 2 * selection.new_tokens + 8_000, selection)
    uses = _uses(domain, texts)
    scores = {piece.piece: piece.score for piece in domain.pieces if piece.type == NORMAL}
    chosen: dict[str, float] = {}
    for index in sorted(range(len(domain.pieces)), key=lambda index: -domain.pieces[index].score):
        piece = domain.pieces[index].piece
        if piece not in scores or piece in known or uses[piece] < selection.min_frequency:
            continue
        needed = [character for character in piece if character not in known] if len(piece) > 1 else []
        needed = [*dict.fromkeys(needed), piece]
        if len(chosen) + len(needed) > selection.new_tokens:
            break
        if all(part in scores and selection.allows(part.replace(SPACE, " "), special) for part in needed):
            chosen |= {part: scores[part] for part in needed}
            known.update(needed)
    return list(chosen.items())


def _uses(domain: ModelProto, texts: Sequence[str]) -> collections.Counter[str]:
    """How often each piece stands in the text, or, of a BPE, on the way to one that does."""
    encoder, ids = processor(domain), collections.Counter()
    for first in range(0, len(texts), 1024):
        ids.update(itertools.chain.from_iterable(encoder.encode(list(texts[first : first + 1024]), num_threads=2)))
    uses = collections.Counter({domain.pieces[index].piece: count for index, count in ids.items()})
    if domain.trainer_spec.model_type == BPE:
        scores = {piece.piece: piece.score for piece in domain.pieces if piece.type == NORMAL}
        ranks = {pair: -score for piece, score in scores.items() for pair in all_splits(piece, scores)}
        for index, count in ids.items():
            piece = domain.pieces[index].piece
            steps = {part for step in merge_steps(piece, ranks) for part in step}
            uses.update(dict.fromkeys(steps - {piece}, count))
    return uses
