"""Conversations as tokens, each with whether it is to be learnt."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool

from cpt_jax.data.chat_template import ChatTemplate, Rendering, ResponseFinder
from cpt_jax.data.conversations import Unusable
from cpt_jax.data.prepare import NOT_LEARNT
from cpt_jax.data.sources import Document, SkipCounts
from cpt_jax.vocab.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class MeasuredChat:
    """A conversation to be evaluated on its answers' text: token ids, those that count, and the bytes these stand
    for."""

    tokens: list[int]
    counted: Bool[np.ndarray, "tokens"]
    bytes: int


class ChatEncoder:
    """Conversations under a tokenizer and a chat template.

    The whole rendering is tokenised, special tokens in it as such, exactly as transformers does. A token is an
    answer's if it holds any character of it: where a merge takes a character of the header in, the answer could not be
    written without it.

    Raises:
      UserError: the template cannot be used to learn from.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.fingerprint = tokenizer.fingerprint
        self._tokenizer = tokenizer
        self._finder = ResponseFinder(template, tokenizer)

    def rendered(
        self,
        documents: Iterable[Document],
        skipped: SkipCounts,
        leave_out: Callable[[str, str], None] = lambda reason, text: None,
    ) -> Iterator[Rendering]:
        """The conversations that can be used; the others are counted in `skipped` by reason, and told with their text to
        `leave_out`."""
        for document in documents:
            try:
                yield self._finder.find(document.messages)
            except Unusable as reason:
                skipped[str(reason)] += 1
                leave_out(str(reason), document.text)

    def encode_documents(self, renderings: list[Rendering]) -> list[np.ndarray]:
        """Token ids [tokens] of each; those that are not to be learnt carry the bit NOT_LEARNT."""
        encodings = self._tokenizer.encode_marked([rendering.text for rendering in renderings])
        records = []
        for rendering, encoding in zip(renderings, encodings, strict=True):
            spans = [(response.start, response.end) for response in rendering.responses]
            learnt = _overlapping(encoding.offsets, spans, len(rendering.text))
            records.append(np.asarray(encoding.ids, np.uint32) | np.where(learnt, 0, NOT_LEARNT).astype(np.uint32))
        return records

    def measured(self, renderings: Sequence[Rendering]) -> list[MeasuredChat]:
        """As bits per byte count them: what ends a turn does not count, as no document's end does."""
        encodings = self._tokenizer.encode_marked([rendering.text for rendering in renderings])
        chats = []
        for rendering, encoding in zip(renderings, encodings, strict=True):
            spans = [(response.start, response.content_end) for response in rendering.responses]
            size = sum(len(rendering.text[start:end].encode()) for start, end in spans)
            chats.append(MeasuredChat(encoding.ids, _overlapping(encoding.offsets, spans, len(rendering.text)), size))
        return chats


def _overlapping(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], length: int
) -> Bool[np.ndarray, "tokens"]:
    """Which tokens hold a character of a span; one without characters of its own stands for the next."""
    inside = np.zeros(length + 1, np.int64)
    for start, end in spans:
        inside[start:end] = 1
    before = np.concatenate([[0], np.cumsum(inside)])
    first, last = np.asarray(offsets, np.int64).reshape(-1, 2).T
    return before[np.maximum(last, first + 1)] > before[first]
