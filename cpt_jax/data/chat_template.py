"""A chat template: how a conversation is written for a model, and where in the writing the answers stand."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from cpt_jax.core.errors import UserError
from cpt_jax.data.conversations import Message, Unusable
from cpt_jax.vocab.tokenizer import Tokenizer

PROBE: list[Message] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
# Characters of private use: what marks a message's borders must stand in no text.
MARKERS = tuple(map(chr, range(0xE000, 0xF8FF)))


@dataclasses.dataclass(frozen=True)
class Response:
    """Characters [start, end) of a rendering that the model is to write: an answer, up to `content_end`, and what ends
    its turn."""

    start: int
    content_end: int
    end: int


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A conversation as the model reads it."""

    text: str
    responses: tuple[Response, ...]


class ChatTemplate:
    """The tokenizer's chat template, or one from a file.

    Raises:
      UserError: there is none, or it is no Jinja template.
    """

    def __init__(self, tokenizer: Tokenizer, path: Path | None = None) -> None:
        self.source = tokenizer.chat_template if path is None else read_template(path)
        self.name = f"the chat template of {tokenizer.directory}" if path is None else f"chat template {path}"
        if self.source is None:
            raise UserError(
                f"the tokenizer in {tokenizer.directory} has no chat template: give a Jinja file (--chat-template FILE), "
                "or take an instruction-tuned model's tokenizer"
            )
        self._tokens = tokenizer.named_special_tokens
        try:
            self.render(PROBE[:1])
        except jinja2.TemplateError as error:
            raise UserError(
                f"{self.name} cannot be used ({_line(error)}): give another (--chat-template FILE)"
            ) from error

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The conversation as text; `prompt`: with the header of the answer that is to come."""
        return self._rendered(messages, prompt, False)[0]

    @property
    def marks_answers(self) -> bool:
        """Whether it says itself which text is the model's, in blocks {% generation %}."""
        return re.search(r"\{%-?\s*generation\b", str(self.source)) is not None

    def answers(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and what its blocks {% generation %} hold."""
        return self._rendered(messages, False, True)

    def _rendered(self, messages: Sequence[Message], prompt: bool, blocks: bool) -> tuple[str, list[tuple[int, int]]]:
        # Transformers' own sandbox: templates are other people's programs.
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template
        texts, spans = render(
            conversations=[list(messages)],
            chat_template=self.source,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=blocks,
            **self._tokens,
        )
        return texts[0], spans[0] if blocks else []


class ResponseFinder:
    """Where the answers of conversations stand in their renderings.

    A template with blocks {% generation %} says so itself. For all others an answer begins where the prompt for it
    ends: the rendering of what was said before, with the header of the coming answer. Where a template writes no such
    header, and for the end of every answer, its text is rendered once more with markers around it.

    Raises:
      UserError: the template ends an answer with none of the tokenizer's tokens: nothing would teach the model to stop.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.template = template
        self._blocks = template.marks_answers
        try:
            asked, prompt = template.render(PROBE[:1]), template.render(PROBE[:1], prompt=True)
            text = template.render(PROBE)
            self._prompts = prompt != asked and text.startswith(prompt)
            [(_, content_end)] = self._located(PROBE, text)
        except (jinja2.TemplateError, Unusable) as error:
            raise UserError(
                f"{template.name} cannot write a question and its answer ({_line(error)}): give another (--chat-template FILE)"
            ) from error
        found = _any_of(tokenizer.added_tokens).search(text, content_end)
        if found is None and not self._blocks:
            raise UserError(
                f"{template.name} ends an answer with no special token, and the model would not learn to stop: "
                "write {{ eos_token }} behind an assistant's content"
            )
        self.end_of_turn = "" if found is None else text[content_end : found.end()]
        self._special = _any_of([*tokenizer.special_tokens, *([] if found is None else [found.group()])])

    def find(self, messages: Sequence[Message]) -> Rendering:
        """The rendering of a conversation, and the answers that are to be learnt in it.

        Raises:
          Unusable: the template refuses it or does not write it as it is, or none of it is to be learnt.
        """
        for message in messages:
            if found := self._special.search(message["content"]):
                raise Unusable(f"the special token {found.group()} within a message")
        try:
            text, responses = self._responses(messages)
        except (jinja2.TemplateError, TypeError) as error:
            raise Unusable(f"chat template: {_line(error)}") from error
        weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
        if not all(weights) and len(weights) != len(responses):
            raise Unusable("weights of messages, and a chat template with other answers than messages")
        if not all(weights):
            responses = [response for response, weight in zip(responses, weights, strict=True) if weight]
        # The first token has nothing before it to be predicted from.
        if not any(response.end > max(1, response.start) for response in responses):
            raise Unusable("nothing of an assistant to learn")
        return Rendering(text, tuple(responses))

    def _responses(self, messages: Sequence[Message]) -> tuple[str, list[Response]]:
        if not self._blocks:
            text = self.template.render(messages)
            ends = len(self.end_of_turn)
            located = [(start, self._content_end(text, start, end)) for start, end in self._located(messages, text)]
            return text, [
                Response(start, end, end + ends * text.startswith(self.end_of_turn, end)) for start, end in located
            ]
        text, spans = self.template.answers(messages)
        token = self.end_of_turn.strip()
        places = [text.rfind(token, start, end) if token else -1 for start, end in spans]
        return text, [
            Response(start, place if place >= 0 else end, end)
            for (start, end), place in zip(spans, places, strict=True)
        ]

    def _content_end(self, text: str, start: int, end: int) -> int:
        """Where the end of the turn follows: of an answer that ends in white space, which the template strips and writes
        some of its own, that may be earlier."""
        stripped = start + len(text[start:end].rstrip())
        return stripped if text.startswith(self.end_of_turn, stripped) else end

    def _located(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """The borders of each assistant's content."""
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        marker = next(character for character in MARKERS if character not in text)
        before = "" if self._prompts else marker
        marked = [
            message | {"content": before + message["content"] + marker} if index in answers else message
            for index, message in enumerate(messages)
        ]
        borders = _borders(self.template.render(marked).split(marker), text)
        if len(borders) != len(answers) * (1 if self._prompts else 2):
            raise Unusable("the chat template leaves out an answer, or repeats it")
        if not self._prompts:
            return list(zip(borders[::2], borders[1::2], strict=True))
        prompts = [self._prompt(messages[:index]) for index in answers]
        for prompt, end in zip(prompts, borders, strict=True):
            if len(prompt) > end or not text.startswith(prompt):
                raise Unusable("the chat template writes the prompt for an answer otherwise than the conversation")
        return list(zip(map(len, prompts), borders, strict=True))

    def _prompt(self, said: Sequence[Message]) -> str:
        try:
            return self.template.render(said, prompt=True)
        except (jinja2.TemplateError, TypeError):
            if said:
                raise
            # Many look at the first message without asking whether there is one (Llama 3.1's, Qwen's).
            raise Unusable("the assistant speaks first, and the chat template writes no prompt for that") from None


def _borders(parts: Sequence[str], text: str) -> list[int]:
    """Where in `text` each part but the last ends; templates may strip a message's text."""
    borders, position = [], 0
    for part in parts:
        ways = (part, part.rstrip(), part.lstrip(), part.strip())
        found = next((way for way in ways if text.startswith(way, position)), None)
        if found is None:
            raise Unusable("the chat template changes an answer's text")
        position += len(found)
        borders.append(position)
    if position != len(text):
        raise Unusable("the chat template changes an answer's text")
    return borders[:-1]


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches the first of these in a text, the longest one where several begin."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def written_by(tokenizer: Tokenizer, path: Path | None) -> list:
    """What decides how conversations are written: the template, and the special tokens that it may name."""
    template = tokenizer.chat_template if path is None else read_template(path)
    return [template, tokenizer.named_special_tokens]


def read_template(path: Path) -> str:
    """The text of a template's file.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat template {path} cannot be read ({error}): give a Jinja file (UTF-8)") from error


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]
