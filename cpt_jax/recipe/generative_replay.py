"""`cpt data generate`: text that a model writes itself, to be replayed where what it was trained on is not at hand."""

import dataclasses
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cpt_jax.core.config import fingerprint, to_json
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.progress import number_of, progress, quiet_libraries, say
from cpt_jax.core.storage import disk_full_is_told, json_line, objects_in
from cpt_jax.data.chat_template import MARKERS, ChatTemplate
from cpt_jax.data.conversations import Message
from cpt_jax.data.sources import TRUNCATED, counted
from cpt_jax.models.continuous import ContinuousGeneration, Request
from cpt_jax.models.generate import check_room
from cpt_jax.models.sampling import Sampling
from cpt_jax.recipe.find import find_model
from cpt_jax.recipe.generate_command import INCOMPLETE, end_ids_of
from cpt_jax.recipe.grow import check_fits
from cpt_jax.recipe.model import load_model
from cpt_jax.sharding.hardware import fastest_type
from cpt_jax.vocab.tokenizer import Tokenizer

# Documents that cannot be used, in a row, for each that is written together: so many are no chance.
USELESS = 4
# Documents' numbers are below this; an answer has random numbers of its own.
ANSWERS = 1 << 31
# What a chat template writes between a question and its answer.
MARGIN = 64


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
        self._rehearsal, self._tokenizer, self._heard = rehearsal, Tokenizer(directory), heard
        model = load_model(directory)
        check_fits(self._tokenizer, model.config.total_rows, directory)
        self._network, self._ends = model.network, end_ids_of(directory, self._tokenizer)
        self._template = ChatTemplate(self._tokenizer) if rehearsal.chat else None
        added = self._tokenizer.document["added_tokens"]
        self._special = frozenset(token["id"] for token in added if token["special"])
        self._start = [self._tokenizer.start_id] if self._template is None else self._of_user(self._template)
        check_room(model.config, [self._start], rehearsal.document_tokens)
        # A question, with what is written around it, and its answer.
        longest = len(self._start) + rehearsal.document_tokens * (2 if rehearsal.chat else 1)
        self._longest = min(model.config.context_length, longest + (MARGIN if rehearsal.chat else 0))
        self._type = fastest_type()
        self._weights = model.on_device(Precision(compute=self._type))
        self.skipped: Counter[str] = Counter()

    def documents(self, first: int) -> Iterator[dict[str, Any]]:
        """Those from this number on that are usable, in order: a text, or messages, with its number and its tokens.

        Raises:
          UserError: of many in a row none is usable.
        """
        found: dict[int, dict[str, Any] | None] = {}
        due, useless = first, 0
        for number, document in self._found(first):
            found[number] = document
            while due in found:
                document = found.pop(due)
                due, useless = due + 1, useless + 1 if document is None else 0
                if document is not None:
                    yield document
                else:
                    self.skipped["empty" if self._template is None else "no whole question and answer"] += 1
                if useless == USELESS * self._rehearsal.batch:
                    raise UserError(
                        f"of {useless} documents none can be used ({counted(self.skipped)}): give more --document-tokens"
                    )

    def _found(self, first: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Documents by their numbers, or None, as they come to an end."""
        numbers, answers = itertools.count(first), deque[Request]()
        questions: dict[int, tuple[str, int]] = {}
        generation = ContinuousGeneration(
            self._network,
            self._weights,
            lambda: answers.popleft() if answers else Request(number=next(numbers), prompt=self._start),
            rows=self._rehearsal.batch,
            longest=self._longest,
            new_tokens=self._rehearsal.document_tokens,
            sampling=self._rehearsal.sampling,
            end_ids=self._ends,
            compute_dtype=self._type,
            heard=self._heard,
        )
        for written in generation:
            number, text, tokens = written.request.number, self._text(written.tokens), len(written.tokens)
            if self._template is None:
                document = {"text": text, TRUNCATED: not written.ended, "tokens": tokens}
                yield number, {"number": number} | document if text.strip() else None
            elif number >= ANSWERS:
                number -= ANSWERS
                question, before = questions.pop(number)
                messages = [_message("user", question), _message("assistant", text.strip())]
                document = {"number": number, "messages": messages, "tokens": before + tokens}
                yield number, document if written.ended and text.strip() else None
            elif written.ended and (prompt := self._answering(self._template, text.strip())):
                questions[number] = text.strip(), tokens
                answers.append(Request(number=number + ANSWERS, prompt=prompt))
            else:
                yield number, None

    def _answering(self, template: ChatTemplate, question: str) -> list[int]:
        """What an answer follows; nothing where there is no question, or no room."""
        if not question:
            return []
        [encoding] = self._tokenizer.encode_marked([template.render([_message("user", question)], prompt=True)])
        return encoding.ids if len(encoding.ids) + self._rehearsal.document_tokens <= self._longest else []

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
    of = fingerprint([TRUNCATED, model, to_json(dataclasses.replace(rehearsal, batch=1))])[:12]
    written = _continued(out, of)
    done = _tokens(written)
    count, following = len(written), 1 + max((document["number"] for document in written), default=-1)
    with disk_full_is_told(out), progress("generate", max(done, tokens), "tokens", first=done) as bar:
        if done < tokens:
            author = Author(find_model(model), rehearsal, lambda drawn: bar.advance(0, drawn=drawn))
            for document in author.documents(following):
                with out.open("a", encoding="utf-8") as file:
                    file.write(json_line(document | {"of": of}))
                bar.advance(min(document["tokens"], tokens - done))
                done, count = done + document["tokens"], count + 1
                if done >= tokens:
                    break
            if author.skipped:
                say(f"left out: {counted(author.skipped)}")
    print(f"{out}: {number_of(count, 'document')}, {number_of(done, 'token')}")


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
