"""Bases of every kind that the tests of this room extend, and one that is."""

from pathlib import Path

import pytest
from inputs import chinese, english, write_sentencepiece, write_tokenizer
from row_inputs import NEW

from cpt_jax.vocab.extend import ContinuedBPE, extend


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Tokenizer directories: byte-level ones by the model they are like, and SentencePiece's two kinds."""
    root = tmp_path_factory.mktemp("bases")
    for kind in ("gpt2", "qwen", "llama3"):
        write_tokenizer(root / kind, english(300), kind=kind)
    write_sentencepiece(root / "bpe", english(300), "bpe", 380)
    write_sentencepiece(root / "unigram", english(300), "unigram", 295)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="session")
def grown(bases, tmp_path_factory) -> tuple[Path, Path]:
    """(base, extended) tokenizer directories."""
    out = tmp_path_factory.mktemp("grown") / "tokenizer"
    extend(bases["gpt2"], ContinuedBPE(new_tokens=NEW), chinese(400), english(300), out)
    return bases["gpt2"], out
