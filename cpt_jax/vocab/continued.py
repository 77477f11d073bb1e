"""Merge learning that goes on from the base's own segmentation (Purason et al. 2025, arXiv 2512.03989)."""

import array
import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from cpt_jax.core.errors import UserError
from cpt_jax.core.progress import number_of, say
from cpt_jax.vocab.merges import Pair, PairCounts
from cpt_jax.vocab.segmentation import CharacterBPE, Segmentation
from cpt_jax.vocab.selection import Selection

# A pair that is a hundred times rarer in the old text than in the new one is no matter of the old one.
RARE = 0.01


@dataclasses.dataclass(frozen=True)
class NewPiece:
    """A piece in the base's inner spelling and the two that are merged into it (None: a character of its own)."""

    piece: str
    parts: tuple[str, str] | None


class ContinuedLearning:
    """One learning of pieces.

    A piece is refused where it would change how `protected` text is tokenised (a pair that stands side by side in
    it, oftener than the selection tolerates), where the selection excludes it, and where it would leave one of its own parts with fewer uses than
    `min_frequency`: such a part would take up a row and never be produced.
    """

    def __init__(
        self, kind: Segmentation, selection: Selection, texts: Sequence[str], protected: Iterable[str]
    ) -> None:
        self.kind, self.selection = kind, selection
        words = kind.words(texts)
        self.terms = self._candidate_words(words)
        # Arrays hold a token in 4 bytes, lists of Python's numbers in 36.
        segments = [array.array("i", ids) for word in words for ids in kind.segments([word])]
        self.pairs = PairCounts(segments, list(words.values()))
        self.old_pairs, self.old_tokens = adjacent(kind, protected)
        self.new_size, self.old_size = self.pairs.uses.total(), self.old_tokens.total()
        # Uses in the new text of pairs that were refused for the sake of an old text that hardly has them.
        self.kept_apart: dict[Pair, int] = {}
        self.next_id = kind.first_new
        self.known = {piece for piece, index in kind.ids.items() if not self._is_unknown(index)}

    def _is_unknown(self, index: int) -> bool:
        return isinstance(self.kind, CharacterBPE) and index >= self.kind.unknown

    def pieces(self) -> Iterator[NewPiece]:
        """The new pieces, candidates first, then the most frequent."""
        for term in self.terms:
            yield from self._spell(term)
        characters = self._unknown_characters()
        for _ in range(self.selection.new_tokens):
            found = self.pairs.most_frequent(self._allowed, self._leaves_parts_in_use)
            gain, character = characters[-1] if characters else (0, "")
            # A character that was spelt in n bytes saves n - 1 tokens each time. It occurs as often as any pair
            # that holds it, so that it is always learnt before them.
            if gain and (found is None or gain >= found[1]):
                characters.pop()
                yield self._take_character(character)
            elif found is None or found[1] < self.selection.min_frequency:
                break
            else:
                yield self._take(found[0])
        self._tell_kept_apart()

    def _tell_kept_apart(self) -> None:
        """Old text that holds a little of the new language can cost most of what growing would bring."""
        if not self.kept_apart:
            return
        pair = max(self.kept_apart, key=lambda pair: self.kept_apart[pair])
        old = max(self.old_pairs.get(way, 0) for way in self._ways(pair))
        text = self.kind.text(self.kind.pieces[pair[0]] + self.kind.pieces[pair[1]])
        what = repr(text) if text else "a part of a character"
        say(
            f"tokenizer: kept apart for the old text's sake: {number_of(len(self.kept_apart), 'pair')} a hundred times rarer there, "
            f"above all {what}, {self.kept_apart[pair]:,} x in the new text and {old:,} x in the old; --tolerance 0.01 (of a run "
            "--vocabulary.extension.tolerance 0.01) merges what is so rare"
        )

    def _allowed(self, pair: Pair) -> bool:
        kind, selection = self.kind, self.selection
        piece = kind.pieces[pair[0]] + kind.pieces[pair[1]]
        if piece in self.known or kind.characters(piece) > selection.max_piece_characters or not kind.joins(piece):
            return False
        if any(self._is_unknown(index) and not self._may_add(kind.pieces[index], index) for index in pair):
            return False
        ways = self._ways(pair)
        allowed = selection.allows(kind.text(piece), kind.special)
        old, new = max((self.old_pairs.get(way, 0) for way in ways), default=0), self.pairs.counts[pair]
        if allowed and self._belongs_to_old(old, new, self.selection.tolerance):
            if not self._belongs_to_old(old, new, RARE):
                self.kept_apart[pair] = new
            return False
        return allowed

    def _belongs_to_old(self, old: int, new: int, tolerance: float) -> bool:
        """Whether what is used so often in the two texts is too frequent in the old one to be merged."""
        return old * self.new_size > tolerance * new * self.old_size

    def _ways(self, pair: Pair) -> Sequence[Pair]:
        """All pairs that the merge of this one would merge."""
        kind = self.kind
        return kind.splits(kind.pieces[pair[0]] + kind.pieces[pair[1]]) if kind.merges_by_spelling else [pair]

    def _may_add(self, character: str, index: int) -> bool:
        saves = len(character.encode()) > 1
        old = self._belongs_to_old(self.old_tokens.get(index, 0), self.pairs.uses[index], self.selection.tolerance)
        return saves and not old and self.selection.allows(character, self.kind.special)

    def _leaves_parts_in_use(self, pair: Pair, count: int) -> bool:
        taken = 2 * count if pair[0] == pair[1] else count
        return all(
            index < self.kind.first_new or self.pairs.uses[index] - taken >= self.selection.min_frequency
            for index in pair
        )

    def _unknown_characters(self) -> list[tuple[int, str]]:
        """(tokens saved, character) of those that are no piece yet, the best last."""
        if not isinstance(self.kind, CharacterBPE):
            return []
        found = []
        for index, piece in self.kind.pieces.items():
            uses = self.pairs.uses[index]
            new = self._is_unknown(index) and piece not in self.known and uses >= self.selection.min_frequency
            if new and self._may_add(piece, index):
                found.append((uses * (len(piece.encode()) - 1), piece))
        return sorted(found, key=lambda entry: (entry[0], entry[1]))

    def _take_character(self, character: str) -> NewPiece:
        self.known.add(character)
        self.next_id += 1
        return NewPiece(character, None)

    def _take(self, pair: Pair) -> NewPiece:
        kind, index = self.kind, self.next_id
        left, right = kind.pieces[pair[0]], kind.pieces[pair[1]]
        piece = left + right
        ways = [pair] + ([way for way in kind.splits(piece) if way != pair] if kind.merges_by_spelling else [])
        for way in ways:
            if self.pairs.counts.get(way, 0):
                self.pairs.merge(way, index)
        kind.ids[piece], kind.pieces[index] = index, piece
        self.known.add(piece)
        self.next_id += 1
        return NewPiece(piece, (left, right))

    # Candidates

    def _candidate_words(self, words: dict[str, int]) -> list[str]:
        """The candidates in inner spelling; with a space before them where the corpus has them so."""
        self.selection.check_candidates(self.kind.special)
        terms, split = [], []
        for text in self.selection.candidates:
            forms = [form for form in (text, " " + text) if len(self.kind.spelling(form)) == 1]
            if not forms:
                split.append(text)
                continue
            spelt = [self.kind.spelling(form)[0] for form in forms]
            terms.extend([word for word in spelt if words.get(word)] or spelt[:1])
        if split:
            say(
                f"tokenizer: {len(split)} candidates are several words to the base's pre-tokenizer and can be no piece: {', '.join(map(repr, split[:5]))}"
            )
        if self.selection.candidates and not terms and not self.selection.new_tokens:
            raise UserError(
                "no candidate can be a piece of this tokenizer: see its pre-tokenizer, or learn pieces from the text"
            )
        return list(dict.fromkeys(terms))

    def _spell(self, term: str) -> Iterator[NewPiece]:
        """The pieces that lead to a term, from left to right, the term itself last."""
        if term in self.known:
            return
        (ids,) = self.kind.segments([term])
        new = [index for index in dict.fromkeys(ids) if self._is_unknown(index)]
        new = [index for index in new if self.kind.pieces[index] not in self.known]
        ids = self._apply_new_merges(ids)
        if any(self.old_tokens[index] for index in new) or self._changes_old_text(ids):
            say(f"tokenizer: candidate {self.kind.text(term)!r} is left out: its parts stand together in the old text")
            return
        for index in new:
            yield self._take_character(self.kind.pieces[index])
        while len(ids) > 1:
            pair = (ids[0], ids[1])
            if self.kind.pieces[pair[0]] + self.kind.pieces[pair[1]] not in self.known:
                yield self._take(pair)
            ids = [self.kind.ids[self.kind.pieces[pair[0]] + self.kind.pieces[pair[1]]], *ids[2:]]

    def _changes_old_text(self, ids: Sequence[int]) -> bool:
        """Whether merging these from left to right merges a pair of the protected text."""
        kind, piece = self.kind, self.kind.pieces[ids[0]]
        for index in ids[1:]:
            ways = [(kind.ids.get(piece), index)]
            piece += kind.pieces[index]
            ways += kind.splits(piece) if kind.merges_by_spelling else []
            if piece not in self.known and not self.old_pairs.keys().isdisjoint(ways):
                return True
        return False

    def _apply_new_merges(self, ids: list[int]) -> list[int]:
        """The pieces that earlier candidates brought, where this one begins with them."""
        length = len(ids)
        while length > 1:
            whole = "".join(self.kind.pieces[index] for index in ids[:length])
            if self.kind.ids.get(whole, -1) >= self.kind.first_new and whole in self.known:
                return [self.kind.ids[whole], *ids[length:]]
            length -= 1
        return ids


def adjacent(kind: Segmentation, texts: Iterable[str]) -> tuple[collections.Counter[Pair], collections.Counter[int]]:
    """Pairs of the base's tokens that stand side by side in a word of the texts (merging one would change these
    texts), and the tokens that occur, with their counts."""
    pairs: collections.Counter[Pair] = collections.Counter()
    tokens: collections.Counter[int] = collections.Counter()
    words = kind.words(texts)
    for times, ids in zip(words.values(), kind.segments(words), strict=True):
        for index in ids:
            tokens[index] += times
        for pair in itertools.pairwise(ids):
            pairs[pair] += times
    return pairs, tokens
