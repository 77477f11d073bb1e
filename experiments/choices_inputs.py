"""Questions for `cpt eval --choices`, from the Python package index, checked by SHA-256, unpacked once.

`python -m experiments.choices_inputs` leaves in `.cache/choices/`, as {"question", "choices", "answer"} (wheel evals, MIT)

    quartz.jsonl                     3,860 questions on how quantities depend on one another (QuaRTz: Tafjord et al. 2019)
    parable-to-moral-match-zh.jsonl  1,930 stories in Chinese and five morals each
"""

import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from configs.quickstart_inputs import EVALS, fetch_wheel
from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import write_text_atomic

DIRECTORY = Path(".cache/choices")
DATA = "evals/registry/data"


def _records(wheel: Path, name: str) -> Iterator[tuple[str, str]]:
    """(what the user says, the letter of the right answer) of each record; instructions to a chat model are left out."""
    with zipfile.ZipFile(wheel) as archive, archive.open(f"{DATA}/{name}") as lines:
        for line in lines:
            record = json.loads(line)
            ideal = record["ideal"]
            yield record["input"][-1]["content"], (ideal if isinstance(ideal, str) else ideal[0])[-1]


def quartz(wheel: Path) -> Iterator[dict]:
    """A beginning of a sentence is to be continued; a whole sentence, or one with a gap, to be answered."""
    for text, letter in _records(wheel, "quartz/samples.jsonl"):
        found = re.fullmatch(r"(.*?)\s*\n\n A: (.*?)\n B: (.*?)\s*", text, re.DOTALL)
        assert found is not None, text
        stem, *choices = found.groups()
        to_continue = stem[-1].isalnum() and "___" not in stem
        yield {
            "question": stem if to_continue else f"{stem}\nAnswer:",
            "choices": choices,
            "answer": "AB".index(letter),
        }


def parables(wheel: Path) -> Iterator[dict]:
    """A story, and its moral on a line of its own: Chinese has no spaces."""
    choice = r"[A-E]\) (.*?)"
    pattern = rf"(.*)\nWhich moral is this story[^\n]*\n{' '.join([choice] * 5)}\nThe output.*"
    for text, letter in _records(wheel, "parable-to-moral-match/parable-to-moral-match-zh.jsonl"):
        found = re.fullmatch(pattern, text, re.DOTALL)
        assert found is not None, text
        story, *choices = found.groups()
        yield {"question": f"{story}\n这个故事的寓意是：\n", "choices": choices, "answer": "ABCDE".index(letter)}


FILES: dict[str, Callable[[Path], Iterator[dict]]] = {
    "quartz.jsonl": quartz,
    "parable-to-moral-match-zh.jsonl": parables,
}


def fetch(directory: Path = DIRECTORY) -> None:
    """Fetches and unpacks what is not there yet; what is there is left alone."""
    directory.mkdir(parents=True, exist_ok=True)
    missing = [name for name in FILES if not (directory / name).exists()]
    if not missing:
        return
    with tempfile.TemporaryDirectory(dir=directory) as downloads:
        wheel = fetch_wheel(EVALS, Path(downloads))
        for name in missing:
            records = (json.dumps(record, ensure_ascii=False) + "\n" for record in FILES[name](wheel))
            write_text_atomic(directory / name, "".join(records))


if __name__ == "__main__":
    try:
        fetch()
    except UserError as error:
        sys.exit(f"error: {error}")
