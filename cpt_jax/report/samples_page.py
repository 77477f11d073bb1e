"""samples.md: prompts, each as it is continued before and after, as Markdown that can be read back whatever they hold."""

import re
from collections.abc import Iterable
from typing import NamedTuple

_SAMPLE = re.compile(
    r"^## ([^\n]*)\n\n\*\*before\*\*\n\n(`{3,})text\n(.*?)\n\2\n\n\*\*after\*\*\n\n(`{3,})text\n(.*?)\n\4$",
    re.DOTALL | re.MULTILINE,
)


class Sample(NamedTuple):
    """A prompt, and the texts that begin with it."""

    prompt: str
    before: str
    after: str


def samples_page(samples: Iterable[Sample]) -> str:
    parts = ["# The same prompts, before and after\n"]
    for prompt, before, after in samples:
        heading = " ".join(prompt.split())
        parts.append(f"\n## {heading}\n\n**before**\n\n{_fenced(before)}\n\n**after**\n\n{_fenced(after)}\n")
    return "".join(parts)


def read_samples(page: str) -> list[Sample]:
    """The samples of a page; of each prompt the heading."""
    return [Sample(prompt, before, after) for prompt, _, before, _, after in _SAMPLE.findall(page)]


def _fenced(text: str) -> str:
    """Between fences of more backticks than stand together in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
