"""Bilingual word vectors, English and Chinese, from text that is aligned line by line: what `wechsel` rows need.

The words of both languages are rows of one matrix, the lines its columns, log-entropy weighted; its left singular vectors put words that occur in
the same lines near each other (cross-language latent semantic indexing, Dumais et al. 1997). Lines: LibreOffice's help,
MPL-2.0 (Debian libreoffice-help-en-us and -zh-cn). Chinese "words" are the pieces that a tokenizer cuts it into.
"""

import collections
import hashlib
import html
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import write_text_atomic
from cpt_jax.vocab.tokenizer import Tokenizer

PACKAGES = {
    "libreoffice-help-en-us": "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712",
    "libreoffice-help-zh-cn": "db867cdece4c2f9c7eebe65e519c6cf386fdcf49d6e061db3dffec893b3e1dee",
}
HELP = "usr/share/libreoffice/help"
LINE = re.compile(r'<(?:p|h\d) id="((?:par|hd|bm|tit)_id\w+)"[^>]*>(.*?)</(?:p|h\d)>', re.DOTALL)


def lines_of(page: Path) -> dict[str, str]:
    """A help page's paragraphs by their ids, which are the same in all languages."""
    found = LINE.findall(page.read_text(encoding="utf-8"))
    return {name: html.unescape(re.sub(r"<[^>]+>", " ", text)).strip() for name, text in found}


def aligned_lines() -> Iterator[tuple[str, str]]:
    """(English, Chinese) paragraphs that differ: the untranslated ones are left out."""
    with tempfile.TemporaryDirectory() as directory:
        for package, sha256 in PACKAGES.items():
            command = ["apt-get", "-o", "APT::Sandbox::User=root", "download", package]
            if subprocess.run(command, cwd=directory, check=False, stdout=subprocess.DEVNULL).returncode:
                raise UserError(f"apt-get could not download {package}: check the network and the package sources")
            (path,) = Path(directory).glob(f"{package}_*.deb")
            if (digest := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
                raise UserError(f"{path.name} has SHA-256 {digest}, expected {sha256}: the archive has another version")
            subprocess.run(["dpkg", "-x", str(path), directory], check=True)
        root = Path(directory) / HELP
        for page in sorted((root / "en-US").rglob("*.html")):
            other = root / "zh-CN" / page.relative_to(root / "en-US")
            if other.exists():
                english, chinese = lines_of(page), lines_of(other)
                yield from (
                    (english[name], chinese[name])
                    for name in english
                    if chinese.get(name, english[name]) != english[name]
                )


def vectors(lines: Sequence[Sequence[str]], width: int = 200, min_count: int = 3) -> dict[str, np.ndarray]:
    """A vector for each word that occurs in `min_count` lines."""
    frequency = collections.Counter(word for line in lines for word in set(line))
    words = sorted(word for word, count in frequency.items() if count >= min_count)
    place = {word: index for index, word in enumerate(words)}
    entries = collections.Counter(
        (place[word], number) for number, line in enumerate(lines) for word in line if word in place
    )
    rows, columns = np.array([list(key) for key in entries]).T
    counts = np.array(list(entries.values()), np.float64)
    total = np.bincount(rows, counts)
    share = counts / total[rows]
    entropy = 1 + np.bincount(rows, share * np.log(share)) / np.log(len(lines))
    matrix = scipy.sparse.csr_matrix((np.log1p(counts) * entropy[rows], (rows, columns)), (len(words), len(lines)))
    left, values, _ = scipy.sparse.linalg.svds(matrix, k=width, v0=np.ones(min(matrix.shape)))
    return dict(zip(words, left * values, strict=True))


def write_vectors(tokenizer: Tokenizer, directory: Path) -> tuple[Path, Path]:
    """en.vec and zh.vec in `directory`; what is there is left alone."""
    files = directory / "en.vec", directory / "zh.vec"
    if all(path.exists() for path in files):
        return files
    pairs = dict.fromkeys(aligned_lines())
    english = [re.findall(r"[a-z]+", text.lower()) for text, _ in pairs]
    encoded = tokenizer.encode_documents([text for _, text in pairs])
    chinese = [[tokenizer.piece(index) for index in ids] for ids in encoded]
    # A prefix tells the languages apart; pieces that hold white space or are no whole characters are left out.
    lines = [
        [f"en:{word}" for word in old] + [f"zh:{piece}" for piece in new if re.fullmatch(r"[\u3400-\u9fff]+", piece)]
        for old, new in zip(english, chinese, strict=True)
    ]
    found = vectors(lines)
    for path, prefix in zip(files, ("en:", "zh:"), strict=True):
        kept = {word.removeprefix(prefix): vector for word, vector in found.items() if word.startswith(prefix)}
        rows = [f"{word} " + " ".join(f"{value:.5f}" for value in vector) for word, vector in kept.items()]
        write_text_atomic(path, f"{len(kept)} 200\n" + "\n".join(rows) + "\n")
    return files
