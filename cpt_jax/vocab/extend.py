"""Growing a tokenizer: new pieces behind the base's, each of whose ids keeps its meaning."""

import dataclasses
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import progress, say
from cpt_jax.core.storage import atomic_directory, write_json_atomic, write_text_atomic
from cpt_jax.vocab.continued import ContinuedLearning, NewPiece
from cpt_jax.vocab.segmentation import kind_of, segmentation_of
from cpt_jax.vocab.selection import Selection, sampled
from cpt_jax.vocab.sentencepiece_model import append_pieces, extended_merges, scores_below
from cpt_jax.vocab.tokenizer import Tokenizer
from cpt_jax.vocab.union import byte_level_union, merge_steps, sentencepiece_union

TOKENIZER_PREFIXES = ("tokenizer", "special_tokens", "added_tokens", "chat_")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuedBPE(Selection):
    """Merge learning goes on from the base's own segmentation of the new text (arXiv 2512.03989). For every BPE."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Union(Selection):
    """The pieces of a tokenizer trained on the new text alone, united with the base's.

    `scores`, for SentencePiece: "below-base", so that text which the base cuts well is cut as before; "own", the
    scores of the domain's tokenizer; "zero", above all pieces of the base, as the Chinese-LLaMA script does.
    """

    scores: Literal["below-base", "own", "zero"] = "below-base"


Extension = ContinuedBPE | Union


@dataclasses.dataclass(frozen=True, kw_only=True)
class Additions:
    """What is written: pieces in order; merges (byte-level only), and scores (SentencePiece)."""

    pieces: list[str]
    merges: list[tuple[str, str]] | None = None
    scores: list[float] | None = None

    def chosen(self, keep: Sequence[int] | range) -> "Additions":
        """Those at these places. Learning is greedy: the first are those that a smaller learning finds."""

        def kept(values):
            return None if values is None else [values[index] for index in keep]

        return Additions(pieces=kept(self.pieces) or [], merges=kept(self.merges), scores=kept(self.scores))


def learn(base: Tokenizer, extension: Extension, texts: Sequence[str], protected: Iterable[str]) -> Additions:
    """The pieces to add.

    Raises:
      UserError: a tokenizer that cannot be extended this way, or a text in which nothing is worth adding.
    """
    kind = kind_of(base)
    if isinstance(extension, ContinuedBPE):
        learning = ContinuedLearning(segmentation_of(base), extension, texts, _sampled(protected, extension))
        return _checked(_from_pieces(_shown(learning.pieces(), extension), kind))
    if extension.candidates:
        raise UserError("candidates go with continued-bpe: --method continued-bpe")
    if kind == "byte-level":
        if extension.scores != "below-base":
            raise UserError(
                f"scores {extension.scores!r} are for SentencePiece: a byte-level BPE has an order of merges only"
            )
        some = _sampled(protected, extension)
        return _checked(_from_pieces(_shown(byte_level_union(base, extension, texts, some), extension), kind))
    found = sentencepiece_union(base, extension, texts)
    return _checked(Additions(pieces=[piece for piece, _ in found], scores=_scores(base, extension, found)))


def _sampled(protected: Iterable[str], extension: Extension) -> list[str]:
    texts, size, whole = sampled(protected, extension.sample_bytes)
    if size < whole:
        say(f"tokenizer: protecting {_part(size, whole)}")
    return texts


def _part(size: int, whole: int) -> str:
    return f"{size:,} of {whole:,} bytes, whole documents chosen by hash"


def _shown(pieces: Iterable[NewPiece], extension: Extension) -> list[NewPiece]:
    """All of them, with their progress."""
    found = []
    with progress("tokenizer: new pieces", extension.new_tokens + len(extension.candidates), "pieces") as shown:
        for piece in pieces:
            found.append(piece)
            if len(found) % 100 == 0:
                shown.advance(100)
    return found


def _from_pieces(found: Sequence[NewPiece], kind: str) -> Additions:
    merges = [piece.parts for piece in found if piece.parts is not None] if kind == "byte-level" else None
    return Additions(pieces=[piece.piece for piece in found], merges=merges)


def _checked(additions: Additions) -> Additions:
    if not additions.pieces:
        raise UserError("nothing in the corpus is worth adding to the vocabulary: set the number of new pieces to 0")
    return additions


def _scores(base: Tokenizer, extension: Union, found: Sequence[tuple[str, float]]) -> list[float] | None:
    if extension.scores == "own":
        # A BPE's scores are whole numbers, its pieces' places in the order of learning. Halves keep those of two
        # tokenizers apart: of equal scores SentencePiece takes the leftmost, which no order of merges can say.
        bpe = base.document["model"]["type"] == "BPE"
        return [score - 0.5 if bpe else score for _, score in found]
    return [0.0] * len(found) if extension.scores == "zero" else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extended:
    """What an extension did."""

    new_pieces: int
    dropped: int
    learnt_bytes: int
    corpus_bytes: int


def extend(
    base_directory: Path,
    extension: Extension,
    texts: Iterable[str],
    protected: Iterable[str],
    out: Path,
    *,
    drop_unreachable: bool = False,
) -> Extended:
    """Writes the extended tokenizer into `out` with the base's other tokenizer files.

    Ids of the base stay; added and special tokens stay; new ids begin behind all of them. A base with a
    tokenizer.model gets both that and tokenizer.json.

    Args:
      texts: what to learn pieces from.
      protected: text of the old domain, which continued-bpe leaves tokenised as before.
      drop_unreachable: leave out learnt pieces that the extended tokenizer never produces on `texts`, as far as no
        other piece is made of them.

    Raises:
      UserError: a tokenizer of another kind, or a text in which nothing is worth adding; nothing is written.
    """
    base = Tokenizer(base_directory)
    kind_of(base)
    corpus, learnt_bytes, corpus_bytes = sampled(texts, extension.sample_bytes)
    if learnt_bytes < corpus_bytes:
        say(f"tokenizer: learning from {_part(learnt_bytes, corpus_bytes)}")
    additions = learn(base, extension, corpus, protected)
    wanted = len(additions.pieces)
    with atomic_directory(Path(out)) as directory:
        write_extended(base, additions, directory)
        while drop_unreachable:
            kept = _in_use(base, additions, Tokenizer(directory), corpus, set(extension.candidates))
            if len(kept.pieces) == len(additions.pieces):
                break
            additions = _checked(kept)
            write_extended(base, additions, directory)
    return Extended(
        new_pieces=len(additions.pieces),
        dropped=wanted - len(additions.pieces),
        learnt_bytes=learnt_bytes,
        corpus_bytes=corpus_bytes,
    )


def _in_use(base: Tokenizer, additions: Additions, extended: Tokenizer, corpus: Sequence[str], asked: set[str]):
    """The additions that occur in the corpus, that lead to others, or that the user asked for."""
    seen = extended.count(corpus)
    wanted = {
        piece
        for index, piece in enumerate(additions.pieces)
        if seen[base.size + index] or extended.piece(base.size + index).strip() in asked
    }
    wanted |= _on_the_way(wanted, extended)
    return additions.chosen([index for index, piece in enumerate(additions.pieces) if piece in wanted])


def _on_the_way(pieces: Iterable[str], tokenizer: Tokenizer) -> set[str]:
    """What is merged into these pieces, step by step; nothing for a unigram."""
    if tokenizer.document["model"]["type"] == "Unigram":
        return set()
    ranks = {merge: rank for rank, merge in enumerate(tokenizer.merges)}
    return {part for piece in pieces for step in merge_steps(piece, ranks) for part in step}


def write_extended(base: Tokenizer, additions: Additions, directory: Path) -> None:
    """Tokenizer files of the base with the additions, into an existing directory."""
    document = json.loads(json.dumps(base.document))
    model, proto = document["model"], base.sentencepiece
    scores = additions.scores
    if model["type"] == "Unigram":
        if scores is None:
            lowest = min(score for _, score in model["vocab"] if score > -1e6)
            scores = [lowest - 1 - rank / 1000 for rank in range(len(additions.pieces))]
        # A unigram's ids are places in its list: added tokens behind it take theirs.
        added = {token["id"]: token["content"] for token in document["added_tokens"]}
        model["vocab"] += [
            [added.get(index, f"<unused{index}>"), 0.0] for index in range(len(model["vocab"]), base.size)
        ]
        model["vocab"] += [[piece, score] for piece, score in zip(additions.pieces, scores, strict=True)]
    else:
        as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
        if additions.merges is not None:
            merges = base.merges + additions.merges
        else:
            merges = extended_merges(base.merges, model["vocab"], additions.pieces, scores, proto)
        model["merges"] = [" ".join(merge) if as_text else list(merge) for merge in merges]
        # `tokenizers` gives an added token that the vocabulary lacks the next free id, whatever the file says (Qwen,
        # Llama 3): in the vocabulary it keeps its own, and no merge makes it.
        model["vocab"] |= {token["content"]: token["id"] for token in document["added_tokens"]}
        model["vocab"] |= {piece: base.size + index for index, piece in enumerate(additions.pieces)}
    for path in base.directory.iterdir():
        if path.suffix in (".json", ".jinja", ".txt") and path.name.startswith(TOKENIZER_PREFIXES):
            shutil.copyfile(path, directory / path.name)
    write_text_atomic(directory / "tokenizer.json", json.dumps(document, ensure_ascii=False))
    if proto is not None:
        if scores is None:
            scores = scores_below(proto, len(additions.pieces))
        grown = append_pieces(proto, document["added_tokens"], list(zip(additions.pieces, scores, strict=True)))
        (directory / "tokenizer.model").write_bytes(grown.SerializeToString())
        if not (directory / "tokenizer_config.json").exists():
            write_json_atomic(directory / "tokenizer_config.json", base.settings)


def old_segmentation(base: Tokenizer, extended: Tokenizer) -> list[list[int]]:
    """For each new id in order, the base's ids of the same text (it may begin or end inside a character)."""
    model = extended.document["model"]
    listed = (
        model["vocab"].items()
        if model["type"] == "BPE"
        else ((piece, i) for i, (piece, _) in enumerate(model["vocab"]))
    )
    by_id = {index: piece for piece, index in listed if index >= base.size}
    tokenise = base.backend.model.tokenize
    return [[token.id for token in tokenise(by_id[index])] for index in range(base.size, extended.size)]
