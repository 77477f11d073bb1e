"""`cpt data generate`: text that a model writes itself, to be replayed where what it was trained on is not at hand."""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from cpt_jax.core.config import fingerprint, to_json
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.progress import number_of, progress, quiet_libraries, say
from cpt_jax.core.storage import disk_full_is_told, json_line, objects_in
from cpt_jax.data.chat_template import MARKERS, ChatTemplate
from cpt_jax.data.conversations import Message
from cpt_jax.data.sources import counted
from cpt_jax.models.generate import Generation, check_room
from cpt_jax.models.sampling import Sampling
from cpt_jax.recipe.find import find_model
from cpt_jax.recipe.generate_command import INCOMPLETE, end_ids_of
from cpt_jax.recipe.grow import check_fits
from cpt_jax.recipe.model import load_model
from cpt_jax.sharding.hardware import fastest_type
from cpt_jax.vocab.tokenizer import Tokenizer

# A batch without a usable document may be chance; so many in a row are not.
EMPTY_BATCHES = 4
# Documents' numbers are below this; an answer has random numbers of its own.
ANSWERS = 1 << 31


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What is written: documents of up to `document_tokens`, `batch` at a time, or, with `chat`, questions and answers of up
    to so many tokens each, as the chat template has them.

    Drawn from the model's whole distribution (temperature 1), they are samples of what it knows: the next-token loss on
    them is, but for a constant, the divergence of the trained model from this one. Pseudo-rehearsal (Robins 1995), for
    language models LAMOL (Sun et al. 2020, arXiv 1909.03329); questions that an aligned model asks itself: Magpie (Xu et
    al. 2024, arXiv 2406.08464).
    """

    document_tokens: int = 512
    batch: int = 32
    chat: bool = False
    sampling: Sampling = Sampling(temperature=1.0)

    def __post_init__(self) -> None:
        for field in ("document_tokens", "batch"):
            if (value := getattr(self, field)) < 1:
                raise UserError(f"--{field.replace('_', '-')} is {value}: give at least 1")
        if self.sampling.temperature == 0:
            raise UserError("--temperature is 0, which writes the same document every time: give more, as in 1")


class Author:
    """A model that writes; what was left out is in `skipped`, by reason. `heard` is told how many tokens it has drawn."""

    def __init__(self, directory: Path, rehearsal: Rehearsal, heard: Callable[[int], None]) -> None:
        self._rehearsal, self._tokenizer = rehearsal, Tokenizer(directory)
        self._heard, self._drawn = heard, 0
        model = load_model(directory)
        check_fits(self._tokenizer, model.config.total_rows, directory)
        self._network, self._ends = model.network, end_ids_of(directory, self._tokenizer)
        self._template = ChatTemplate(self._tokenizer) if rehearsal.chat else None
        added = self._tokenizer.document["added_tokens"]
        self._special = frozenset(token["id"] for token in added if token["special"])
        self._start = [self._tokenizer.start_id] if self._template is None else self._of_user(self._template)
        check_room(model.config, [self._start], rehearsal.document_tokens)
        self._type = fastest_type()
        self._weights = model.on_device(Precision(compute=self._type))
        self.skipped: Counter[str] = Counter()

    def documents(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Those of these numbers that are usable: a text, or messages, with its number and its tokens."""
        first = self._written([self._start] * len(numbers), numbers)
        if self._template is None:
            texts = [self._text(ids) for ids, _ in first]
            found = [
                {"text": text, "tokens": len(ids)} if text.strip() else None
                for text, (ids, _) in zip(texts, first, strict=True)
            ]
        else:
            found = self._conversations(self._template, first, numbers)
        usable = []
        for number, document in zip(numbers, found, strict=True):
            if document is None:
                self.skipped["empty" if self._template is None else "no whole question and answer"] += 1
            else:
                usable.append({"number": number} | document)
        return usable

    def _conversations(
        self, template: ChatTemplate, questions: list[tuple[list[int], bool]], numbers: Sequence[int]
    ) -> list[dict[str, Any] | None]:
        """A question and its answer each, or None where one of them did not end."""
        found: list[dict[str, Any] | None] = [None] * len(numbers)
        asked = [self._text(ids).strip() if ended else "" for ids, ended in questions]
        prompts = [template.render([_message("user", text)], prompt=True) for text in asked]
        ids = [encoding.ids for encoding in self._tokenizer.encode_marked(prompts)]
        room = self._network.config.context_length - self._rehearsal.document_tokens
        rows = [row for row, text in enumerate(asked) if text and len(ids[row]) <= room]
        # As many rows as before, so that there is nothing to compile anew; the others end at once.
        waiting = [ids[row] if row in rows else self._start for row in range(len(numbers))]
        answers = self._written(waiting, [number + ANSWERS for number in numbers], rows)
        for row in rows:
            answer, ended = answers[row]
            if ended and (text := self._text(answer).strip()):
                messages = [_message("user", asked[row]), _message("assistant", text)]
                found[row] = {"messages": messages, "tokens": len(questions[row][0]) + len(answer)}
        return found

    def _written(
        self, prompts: Sequence[list[int]], numbers: Sequence[int], rows: Collection[int] | None = None
    ) -> list[tuple[list[int], bool]]:
        """What follows each prompt (of `rows` alone, where they are given), and whether it came to an end."""
        written: list[list[int]] = [[] for _ in prompts]
        generation = Generation(
            self._network,
            self._weights,
            prompts,
            new_tokens=self._rehearsal.document_tokens,
            sampling=self._rehearsal.sampling,
            end_ids=self._ends,
            numbers=numbers,
            compute_dtype=self._type,
        )
        for row in () if rows is None else set(range(len(prompts))) - set(rows):
            generation.stop(row)
        for row, token in generation:
            written[row].append(token)
            self._drawn += 1
            self._heard(self._drawn)
        return [(ids, len(ids) < self._rehearsal.document_tokens) for ids in written]

    def _text(self, ids: list[int]) -> str:
        # A special token is none in a text that is read again.
        return self._tokenizer.decode([token for token in ids if token not in self._special]).rstrip(INCOMPLETE)

    def _of_user(self, template: ChatTemplate) -> list[int]:
        """What a conversation begins with, up to the user's question."""
        before, found, _ = template.render([_message("user", MARKERS[0])]).partition(MARKERS[0])
        if not found:
            raise UserError(f"{template.name} does not write what a user says as it is: leave out --chat")
        [encoding] = self._tokenizer.encode_marked([before])
        return encoding.ids or [self._tokenizer.start_id]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def generate_data(*, model: str, tokens: int, rehearsal: Rehearsal, out: Path) -> None:
    """Writes documents until they have so many tokens, one a line as they come; called again, it goes on.

    Raises:
      UserError: the file has other things in it, or the model writes nothing that can be used.
    """
    if tokens < 1:
        raise UserError(f"--tokens is {tokens}: give at least 1")
    quiet_libraries()
    # What a document of a number is does not depend on how many are written together.
    of = fingerprint([model, to_json(dataclasses.replace(rehearsal, batch=1))])[:12]
    written = _continued(out, of)
    done = _tokens(written)
    count, following = len(written), 1 + max((document["number"] for document in written), default=-1)
    with disk_full_is_told(out), progress("generate", max(done, tokens), "tokens", first=done) as bar:
        if done < tokens:
            author = Author(find_model(model), rehearsal, lambda drawn: bar.advance(0, drawn=drawn))
            with out.open("a", encoding="utf-8") as file:
                for documents in _batches(author, following, tokens - done, rehearsal.batch):
                    file.write("".join(json_line(document | {"of": of}) for document in documents))
                    file.flush()
                    more = _tokens(documents)
                    bar.advance(min(more, tokens - done))
                    done, count = done + more, count + len(documents)
            if author.skipped:
                say(f"left out: {counted(author.skipped)}")
    print(f"{out}: {number_of(count, 'document')}, {number_of(done, 'token')}")


def _batches(author: Author, following: int, wanted: int, batch: int) -> Iterator[list[dict[str, Any]]]:
    """Batches of documents from a number on, until they have as many tokens as are wanted."""
    empty = 0
    while wanted > 0:
        documents = author.documents(range(following, following + batch))
        following, wanted = following + batch, wanted - _tokens(documents)
        empty = 0 if documents else empty + 1
        if empty == EMPTY_BATCHES:
            raise UserError(
                f"of {EMPTY_BATCHES * batch} documents none can be used ({counted(author.skipped)}): give more --document-tokens"
            )
        yield documents


def _tokens(documents: Sequence[dict[str, Any]]) -> int:
    return sum(document["tokens"] for document in documents)


def _continued(out: Path, of: str) -> list[dict[str, Any]]:
    """The documents that are there; a line that was cut off is taken away.

    Raises:
      UserError: they are another model's, or written with other settings.
    """
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        return []
    content = out.read_text(encoding="utf-8")
    whole = content[: content.rfind("\n") + 1]
    documents = objects_in(whole)
    if any(document.get("of") != of for document in documents) or not (documents or not content.strip()):
        raise UserError(
            f"{out} is no file of this model and these settings: give another --out, or remove it to begin anew"
        )
    if whole != content:
        os.truncate(out, len(whole.encode()))
    return documents
