"""tokenizer.model: SentencePiece's own file, and the tokenizer.json that agrees with it.

A SentencePiece BPE model merges the two neighbours that spell the piece with the highest score, the leftmost first
(Kudo & Richardson 2018, arXiv 1808.06226). tokenizer.json names merges in order instead: all pairs of pieces that
spell a piece, by that piece's score.
"""

import bisect
import io
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece.sentencepiece_model_pb2 as generated
import tokenizers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, decoders, models, normalizers, processors

from cpt_jax.core.errors import UserError

SPACE = "\u2581"
# Classes that protobuf makes when the module is imported: type checkers do not see them.
sentencepiece_model_pb2: Any = generated
ModelProto = Any
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
UNIGRAM, BPE = 1, 2
# Mistral gives runs of spaces a score of -1e9, where float32 cannot tell neighbours apart.
LOWEST_ORDINARY = -1e6


def read_model(path: Path) -> ModelProto:
    """Raises UserError when it is no SentencePiece BPE or unigram model."""
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:
        raise UserError(f"{path} is no SentencePiece model ({error}): fetch it again") from error
    if not proto.pieces or proto.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise UserError(f"{path} is no SentencePiece BPE or unigram model: word and character models cannot be used")
    return proto


def processor(proto: ModelProto) -> SentencePieceProcessor:
    """SentencePiece's own encoder."""
    return SentencePieceProcessor(model_proto=proto.SerializeToString())


def ordinary_pieces(proto: ModelProto) -> dict[str, float]:
    """Pieces that text is cut into, and their scores."""
    return {piece.piece: piece.score for piece in proto.pieces if piece.type in (NORMAL, USER_DEFINED)}


def all_splits(piece: str, vocabulary: Container[str]) -> list[tuple[str, str]]:
    """The pairs of pieces of a vocabulary that spell this one."""
    pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
    return [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]


def fast_tokenizer(proto: ModelProto) -> str:
    """tokenizer.json of a SentencePiece model, as text."""
    scores = ordinary_pieces(proto)
    fallback = proto.trainer_spec.byte_fallback
    unknown = next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN)
    if proto.trainer_spec.model_type == BPE:
        vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
        merges = [(scores[left + right], left, right) for piece in scores for left, right in all_splits(piece, scores)]
        # Pieces of equal score (runs of spaces) grow from the left, as SentencePiece lets them.
        merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
        pairs = [(left, right) for _, left, right in merges]
        model: Any = models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=fallback)
    else:
        listed = [(piece.piece, piece.score) for piece in proto.pieces]
        index = next(i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)
        model = models.Unigram(listed, unk_id=index, byte_fallback=fallback)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = _normalizer(proto)  # type: ignore[assignment]
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    special = [
        AddedToken(piece.piece, special=piece.type != USER_DEFINED, normalized=False)
        for piece in proto.pieces
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(special)
    tokenizer.add_special_tokens([token for token in special if token.special])
    if proto.trainer_spec.bos_id >= 0:
        bos = proto.pieces[proto.trainer_spec.bos_id].piece
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, proto.trainer_spec.bos_id)],
        )
    return tokenizer.to_str()


def _normalizer(proto: ModelProto):
    spec, steps = proto.normalizer_spec, []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def settings_of(proto: ModelProto) -> dict:
    """tokenizer_config.json of a SentencePiece model."""
    spec, names = proto.trainer_spec, {}
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(spec, f"{name}_id")
        if 0 <= index < len(proto.pieces):
            names[f"{name}_token"] = proto.pieces[index].piece
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}


def scores_below(proto: ModelProto, count: int) -> list[float]:
    """Falling scores below every piece of the model, runs of spaces too, that float32 tells apart."""
    lowest = min(ordinary_pieces(proto).values())
    step = max(1.0, 4 * float(np.spacing(np.float32(abs(lowest)))))
    return [lowest - step * (rank + 1) for rank in range(count)]


def append_pieces(proto: ModelProto, added: Sequence[dict], pieces: Sequence[tuple[str, float]]) -> ModelProto:
    """A copy with the base's added tokens (of tokenizer.json) and then the new pieces behind its own, so that ids
    are those of tokenizer.json."""
    grown = sentencepiece_model_pb2.ModelProto()
    grown.CopyFrom(proto)
    for token in sorted(added, key=lambda token: token["id"]):
        if token["id"] >= len(proto.pieces):
            while len(grown.pieces) < token["id"]:
                grown.pieces.add(piece=f"<unused{len(grown.pieces)}>", score=0.0, type=CONTROL)
            grown.pieces.add(piece=token["content"], score=0.0, type=CONTROL if token["special"] else USER_DEFINED)
    for piece, score in pieces:
        grown.pieces.add(piece=piece, score=score, type=NORMAL)
    grown.trainer_spec.vocab_size = len(grown.pieces)
    return grown


def extended_merges(
    old: Sequence[tuple[str, str]],
    vocabulary: Iterable[str],
    new: Sequence[str],
    scores: Sequence[float] | None,
    proto: ModelProto | None,
) -> list[tuple[str, str]]:
    """tokenizer.json's old merges with those of the new pieces (BPE).

    A new piece's merges stand behind the base's, in the order given, or, with `scores`, where its score belongs. A
    new piece may also be a part of an old one: then it is merged into that at the old one's place.
    """
    vocabulary = {*vocabulary, *new}
    last = {left + right: index for index, (left, right) in enumerate(old)}
    fresh = set(new)
    keyed: list[tuple[tuple[float, float, float], tuple[str, str]]] = [
        ((float(index), 0.0, 0.0), merge) for index, merge in enumerate(old)
    ]
    places = [float(len(old))] * len(new)
    if scores is not None and proto is not None:
        # Behind the base's merges of higher or equal score.
        base_scores = ordinary_pieces(proto)
        negative = [-base_scores.get(left + right, LOWEST_ORDINARY) for left, right in old]
        places = [bisect.bisect_right(negative, -score) - 0.5 for score in scores]
    for rank, (piece, place) in enumerate(zip(new, places, strict=True)):
        keyed += [((place, 1.0, float(rank)), pair) for pair in all_splits(piece, vocabulary)]
    for piece, index in last.items():
        keyed += [
            ((float(index), 0.5, 0.0), (left, right))
            for left, right in all_splits(piece, vocabulary)
            if left in fresh or right in fresh
        ]
    return [pair for _, pair in sorted(keyed, key=lambda entry: entry[0])]


def train(base: ModelProto | None, texts: Iterable[str], size: int, selection) -> ModelProto:
    """A tokenizer of the new domain, trained by SentencePiece with the base's own settings."""
    spec = (
        base.trainer_spec
        if base is not None
        else sentencepiece_model_pb2.TrainerSpec(model_type=BPE, byte_fallback=True, split_digits=True)
    )
    rules = base.normalizer_spec if base is not None else sentencepiece_model_pb2.NormalizerSpec(name="identity")
    model = io.BytesIO()
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe" if spec.model_type == BPE else "unigram",
        vocab_size=size,
        hard_vocab_limit=False,
        character_coverage=spec.character_coverage,
        max_sentencepiece_length=selection.max_piece_characters,
        split_digits=spec.split_digits,
        split_by_unicode_script=spec.split_by_unicode_script,
        split_by_whitespace=spec.split_by_whitespace,
        split_by_number=spec.split_by_number,
        byte_fallback=spec.byte_fallback,
        normalization_rule_name=rules.name or "identity",
        add_dummy_prefix=rules.add_dummy_prefix,
        remove_extra_whitespaces=rules.remove_extra_whitespaces,
        max_sentence_length=1 << 20,
        # One thread: the sums of several differ in their last bits from run to run.
        num_threads=1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    return proto
