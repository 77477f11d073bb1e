"""A look at the new text and the base, by which `cpt adapt` chooses."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from cpt_jax.checkpoint.hf import load
from cpt_jax.core import processes
from cpt_jax.core.config import fingerprint, to_json
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.data.sources import Corpus, SkipCounts, corpus_state, read
from cpt_jax.recipe.stations import SAMPLE, holds_nothing_else
from cpt_jax.vocab.init_rows import size_of_rows
from cpt_jax.vocab.tokenizer import Tokenizer

# Text read to decide: enough for the tokenizer's rate, and whole for a small corpus.
SAMPLE_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """What a look at the new text found, and one at the base: the `row_size` of its vocabulary; `unknown`: the share of
    tokens that stand for what its tokenizer cannot spell."""

    bytes: int
    tokens: int
    whole: bool
    first: str
    row_size: float
    unknown: float = 0.0

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens


def _sample(corpora: Sequence[Corpus], tokenizer: Tokenizer, directory: Path) -> Sample:
    texts, size, whole = [], 0, True
    for corpus in corpora:
        taken = 0
        for document in read(corpus, SkipCounts()):
            texts.append(document.text)
            taken += len(document.text.encode())
            if taken > SAMPLE_BYTES:
                whole = False
                break
        size += taken
    _, weights, _ = load(directory)
    probe = texts[:: max(1, len(texts) // 500)]
    probe_bytes = sum(len(text.encode()) for text in probe)
    tokens = tokenizer.count(probe)
    probe_tokens = tokens.total()
    return Sample(
        bytes=size,
        tokens=max(1, probe_tokens * size // max(1, probe_bytes)),
        whole=whole,
        first=texts[0],
        unknown=0.0 if tokenizer.unknown_id is None else tokens[tokenizer.unknown_id] / max(1, probe_tokens),
        row_size=size_of_rows(weights[name]["base"] for name in ("embed", "head") if name in weights),
    )


def kept_sample(corpora: Sequence[Corpus], tokenizer: Tokenizer, base: str, directory: Path, workdir: Path) -> Sample:
    """What a look at the new text and the base finds, or found when the run began: it goes on while they are out of
    reach."""
    kept = workdir / SAMPLE
    of = fingerprint([[to_json(corpus), corpus_state(corpus)] for corpus in corpora] + [tokenizer.fingerprint, base])
    if kept.exists() and (found := json.loads(kept.read_text()))["of"] == of:
        return Sample(**found["sample"])
    sample = _sample(corpora, tokenizer, directory)
    if processes.is_first() and (kept.exists() or holds_nothing_else(workdir)):
        write_json_atomic(kept, {"of": of, "sample": dataclasses.asdict(sample)})
    return sample
