"""What is left out of a corpus besides what cannot be read: by filters, as duplicates, as part of an evaluation set."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from cpt_jax.core.errors import UserError
from cpt_jax.data.filters import find_filter, first_reason
from cpt_jax.data.holdout import Holdout, heldout_hashes, heldout_reason, read_heldout
from cpt_jax.data.sources import Document, corpora_of, corpus_state, texts_of
from cpt_jax.data.words import EvaluationTexts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cleaning:
    """What a prepared corpus leaves out; by default nothing.

    Args:
      filters: each a built-in filter (`filters.BUILT_IN`, as in "language=zh,en") or `module:function`, a function of a
        text that gives the reason for leaving it out, or None.
      duplicates: whether of equal texts only the first stays.
      near_duplicates: how much two texts must have in common (0.8: four of five runs of words) for the later one to be
        left out.
      evaluation_sets: SPECs of text that the model will be measured on.
      evaluation_words: so many words in a row of an evaluation set, and a document is left out; in a recipe the held-out
        documents of all domains are such sets too. None: not looked at.

    Raises:
      UserError: no such filter, or a number out of its range.
    """

    filters: tuple[str, ...] = ()
    duplicates: bool = False
    near_duplicates: float | None = None
    evaluation_sets: tuple[str, ...] = ()
    evaluation_words: int | None = None

    def __post_init__(self) -> None:
        if self.near_duplicates is not None and not 0.3 <= self.near_duplicates <= 0.99:
            raise UserError(
                f"near duplicates of {self.near_duplicates}: give what they have in common, 0.3 to 0.99 (0.8 is usual; equal ones are duplicates)"
            )
        if self.evaluation_words is not None and self.evaluation_words < 3:
            raise UserError(f"evaluation_words is {self.evaluation_words}: give at least 3 (13 is usual)")
        if self.evaluation_sets and self.evaluation_words is None:
            raise UserError(
                "evaluation sets are given, but not evaluation_words, of how many words in a row (13 is usual)"
            )
        for spec in self.filters:
            find_filter(spec)

    @property
    def compares(self) -> bool:
        """Whether documents are compared with each other, which needs all of them to be looked at first."""
        return self.duplicates or self.near_duplicates is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredApart:
    """Documents of a corpus that are only measured: how they are chosen, and the directory that lists them."""

    holdout: Holdout
    directory: Path


def evaluation_state(cleaning: Cleaning) -> list:
    """What tells whether the evaluation sets are still those that were read."""
    return [corpus_state(corpus) for corpus in corpora_of(cleaning.evaluation_sets, "text")]


class Judge:
    """Says of a document by itself why it is left out. `measured`: directories of held-out documents, by their domains'
    names."""

    def __init__(
        self,
        cleaning: Cleaning,
        apart: MeasuredApart | None,
        measured: Sequence[tuple[str, Path]],
        text_field: str,
    ) -> None:
        self._filters = [find_filter(spec) for spec in cleaning.filters]
        self._apart = apart
        self._hashes = set() if apart is None else heldout_hashes(apart.directory)
        self.evaluation = None
        if cleaning.evaluation_words is not None:
            corpora = corpora_of(cleaning.evaluation_sets, text_field)
            sets: list[tuple[str, Iterable[str]]] = [(corpus.name, texts_of([corpus])) for corpus in corpora]
            sets += [(f"what is held out of {name}", read_heldout(directory)) for name, directory in measured]
            self.evaluation = EvaluationTexts(sets, cleaning.evaluation_words)

    def reason(self, document: Document) -> str | None:
        """Why a document is left out, or None."""
        if self._apart is not None:
            reason = heldout_reason(document, self._apart.holdout, self._hashes)
            if reason is not None:
                return reason
        if (reason := first_reason(self._filters, document.text)) is not None:
            return reason
        return None if self.evaluation is None else self.evaluation.reason(document.text)
