"""`cpt generate`: continues prompts, one of them as its tokens come, several together."""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from cpt_jax.checkpoint.hf import named_ids
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import FLOAT32
from cpt_jax.core.progress import number_of, quiet_libraries, say
from cpt_jax.core.stores import Location, fetched, write_json
from cpt_jax.data.chat_template import ChatTemplate
from cpt_jax.models.generate import Generation, check_room
from cpt_jax.models.sampling import Sampling
from cpt_jax.recipe.find import find_model
from cpt_jax.recipe.grow import check_fits
from cpt_jax.recipe.model import Model, load_model
from cpt_jax.vocab.tokenizer import Tokenizer

# Prompts that are read together.
BATCH_ROWS = 8
# A token's text may depend on the one before it: SentencePiece shows no space before a text's first word.
CONTEXT_TOKENS = 4
# What bytes decode to that are no whole character (yet), and how many of them may still become one: UTF-8 has up to four.
INCOMPLETE, MISSING = "\N{REPLACEMENT CHARACTER}", 3


class TextStream:
    """One row's text as its tokens come: whole characters, up to the first of the strings that stop it.

    What could be the beginning of a stop string is held back until it is none.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._shown, self._new = list(prompt[-CONTEXT_TOKENS:]), []
        self._held = ""
        self.text, self.tokens, self.stopped = "", 0, False

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self.tokens += 1
        self._new.append(token)
        text = self._decoded()
        if text.endswith(INCOMPLETE):
            return ""
        self._shown, self._new = self._new, []
        return self._given(text)

    def finish(self) -> str:
        """What is left when no token follows; half a character is not shown, more bytes that are none are."""
        if self.stopped:
            return ""
        text = self._decoded()
        given = self._given(text[: max(len(text.rstrip(INCOMPLETE)), len(text) - MISSING)])
        rest, self._new, self._held = self._held, [], ""
        self.text += rest
        return given + rest

    def _decoded(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._new)[len(before) :]

    def _given(self, text: str) -> str:
        text = self._held + text
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        self.stopped = bool(places)
        end = min(places) if places else len(text) - self._possible_stop(text)
        given, self._held = text[:end], "" if places else text[end:]
        self.text += given
        return given

    def _possible_stop(self, text: str) -> int:
        """How many of the last characters a stop string could begin with."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        ends = (length for length in range(min(longest, len(text)), 0, -1))
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """What was written after a prompt; `finish_reason` as in other interfaces: "stop" (an end token or a stop string)
    or "length"."""

    prompt: str
    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]


class Speed:
    """Tokens per second once the first token is there: reading the prompt, and compiling, come before it."""

    def __init__(self) -> None:
        self.tokens, self.waiting, self._counted, self._running = 0, 0.0, 0, 0.0

    def add(self, streams: Sequence[TextStream], started: float, first: float | None) -> None:
        """A batch that has just ended; `first`: when its first tokens came."""
        now = time.perf_counter()
        self.tokens += sum(stream.tokens for stream in streams)
        self.waiting += (now if first is None else first) - started
        self._counted += sum(max(stream.tokens - 1, 0) for stream in streams)
        self._running += 0.0 if first is None else now - first

    @property
    def tokens_per_second(self) -> float | None:
        return self._counted / self._running if self._counted else None

    def __str__(self) -> str:
        rate = "" if self.tokens_per_second is None else f", {self.tokens_per_second:.1f} tokens per second"
        return f"{number_of(self.tokens, 'token')}{rate}; {self.waiting:.1f} s to compile and to read the prompts"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextGenerator:
    """A model with its tokenizer, and how it is to continue prompts."""

    tokenizer: Tokenizer
    model: Model
    end_ids: frozenset[int]
    new_tokens: int
    sampling: Sampling
    stop: Sequence[str]

    def continuations(
        self, prompts: Sequence[str], ids: Sequence[list[int]], show: Callable[[str], None], speed: Speed
    ) -> list[Continuation]:
        """One continuation a prompt; `show` is given the text of a single prompt as it comes, and of several, each
        whole."""
        network, weights, done = self.model.network, self.model.on_device(FLOAT32), []
        for start in range(0, len(prompts), BATCH_ROWS):
            rows = range(start, min(start + BATCH_ROWS, len(prompts)))
            generation = Generation(
                network,
                weights,
                [ids[row] for row in rows],
                new_tokens=self.new_tokens,
                sampling=self.sampling,
                end_ids=self.end_ids,
                numbers=rows,
            )
            streams = [TextStream(self.tokenizer, ids[row], self.stop) for row in rows]
            self._run(generation, streams, show if len(prompts) == 1 else lambda text: None, speed)
            for row, stream in zip(rows, streams, strict=True):
                ended = stream.stopped or stream.tokens < self.new_tokens
                reason = "stop" if ended else "length"
                done.append(
                    Continuation(prompt=prompts[row], text=stream.text, tokens=stream.tokens, finish_reason=reason)
                )
                if len(prompts) > 1:
                    show(f"[{row + 1}/{len(prompts)}]\n{done[-1].prompt}{done[-1].text}\n\n")
        return done

    def _run(
        self, generation: Generation, streams: Sequence[TextStream], show: Callable[[str], None], speed: Speed
    ) -> None:
        started, first = time.perf_counter(), None
        for row, token in generation:
            first = first or time.perf_counter()
            show(streams[row].push(token))
            if streams[row].stopped:
                generation.stop(row)
        for stream in streams:
            show(stream.finish())
        speed.add(streams, started, first)


def end_ids_of(directory: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Where text ends: at the separator of documents, and at what the model's files call an end (an instruction model
    ends its turn with it)."""
    ends = (ids for _, name, ids in named_ids(directory) if name == "eos_token_id")
    return frozenset(itertools.chain([tokenizer.end_id], *ends))


def read_prompts(path: Path) -> list[str]:
    """Prompts from a file: of .jsonl the field "prompt" of each line, of any other each line; empty lines are none.

    Raises:
      UserError: the file cannot be read, holds no prompt, or a line that is none.
    """
    try:
        # Only these end a line: a text may hold other separators of Unicode's.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts {path} cannot be read ({error}): give a UTF-8 text file") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompts.append(_json_prompt(line, f"{path}:{number}") if path.suffix == ".jsonl" else line)
    if not prompts:
        raise UserError(f"prompts {path} is empty: write one prompt a line")
    return prompts


def _json_prompt(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f'{place} is no JSON ({error}): write {{"prompt": "..."}} on each line') from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f'{place} has no text in a field "prompt": write {{"prompt": "..."}} on each line')
    return record["prompt"]


def chat_prompt(tokenizer: Tokenizer, prompt: str) -> str:
    """The prompt as a user's turn, with the beginning of the answer, by the tokenizer's chat template.

    Raises:
      UserError: it has none.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer in {tokenizer.directory} has no chat template: leave out --chat")
    return ChatTemplate(tokenizer).render([{"role": "user", "content": prompt}], prompt=True)


def generate_text(
    *,
    model: str,
    prompts: Sequence[str],
    prompts_path: Location | None,
    new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    chat: bool,
    json_path: Location | None,
) -> None:
    """`cpt generate`: text on stdout (with --chat the answers alone), its speed on stderr."""
    if prompts_path is not None:
        with fetched(prompts_path) as file:
            prompts = [*prompts, *read_prompts(file)]
    if not prompts:
        raise UserError("nothing to continue: give --prompt TEXT or --prompts FILE")
    if new_tokens < 1:
        raise UserError(f"--new-tokens is {new_tokens}: give at least 1")
    if not all(stop):
        raise UserError("--stop is empty, and every text holds that: leave it out")
    quiet_libraries()
    directory = find_model(model)
    tokenizer, loaded = Tokenizer(directory), load_model(directory)
    check_fits(tokenizer, loaded.config.total_rows, directory)
    written = [chat_prompt(tokenizer, prompt) if chat else prompt for prompt in prompts]
    start = [] if chat else [tokenizer.start_id]
    ids = [[*start, *encoding.ids] for encoding in tokenizer.encode_marked(written)]
    generator = TextGenerator(
        tokenizer=tokenizer,
        model=loaded,
        end_ids=end_ids_of(directory, tokenizer),
        new_tokens=new_tokens,
        sampling=sampling,
        stop=stop,
    )
    speed = Speed()
    check_room(loaded.config, ids, new_tokens)
    if len(prompts) == 1 and not chat:
        _show(prompts[0])
    done = generator.continuations(prompts, ids, _show, speed)
    if len(prompts) == 1:
        _show("\n")
    say(str(speed))
    if json_path is not None:
        results = [dataclasses.asdict(each) for each in done]
        write_json(json_path, {"results": results, "tokens_per_second": speed.tokens_per_second})


def _show(text: str) -> None:
    print(text, end="", flush=True)
