"""The speed of extended tokenizers, of preparation, and of learning pieces from 100 MB.

    python -m benchmarks.tokenizer

Prints Markdown tables and writes benchmarks/results/tokenizer.json; under 8 minutes on two quiet cores. The inputs come from
`configs.quickstart_inputs`, `experiments.vocabulary_inputs` and `experiments.vocabulary_tables`.

Encoding: the base and the extended tokenizer take turns on the same text; the ratio is that of their best times. Preparation: the same text,
in memory, by `prepare` into ArrayRecord and by `tokenizers`' encode_batch alone. Learning: each trainer in a process of its own, 8,000 pieces, the
text in memory; peak memory is the process's, and what the text alone takes stands beside it.
"""

import argparse
import itertools
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cpt_jax.core.progress import quiet_libraries, say
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.data.prepare import prepare
from cpt_jax.data.sources import SkipCounts, read
from cpt_jax.vocab.extend import ContinuedBPE, extend, learn
from cpt_jax.vocab.tokenizer import Tokenizer
from experiments.vocabulary_inputs import DIRECTORY
from experiments.vocabulary_tables import bases, corpora

OUT = Path("benchmarks/results/tokenizer.json")
PIECES = 8_000
LEARNT_BYTES = 100_000_000
TRAINERS = ("text alone", "continued-bpe", "tokenizers BpeTrainer", "SentencePiece")
ENCODED = (("SmolLM2", "statutes"), ("Qwen3", "manpages"), ("Mistral v1", "poems"))


def texts_of(name: str, limit: int) -> list[str]:
    """Documents of a corpus, spread over all of it, up to `limit` bytes."""
    documents = [document.text for document in read(corpora()[name], SkipCounts())]
    step = max(1, sum(len(text.encode()) for text in documents) // limit)
    return documents[::step]


def all_texts() -> list[str]:
    """100 MB: every corpus there is, no document twice."""
    shi = (json.loads(line)["text"] for line in (DIRECTORY / "shi.jsonl").open(encoding="utf-8"))
    others = (document.text for corpus in corpora().values() for document in read(corpus, SkipCounts()))
    chosen, size = {}, 0
    for text in itertools.chain(others, shi):
        if text not in chosen:
            chosen[text] = None
            size += len(text.encode())
        if size >= LEARNT_BYTES:
            break
    return list(chosen)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _alternately(before: Tokenizer, after: Tokenizer, texts: list[str]) -> tuple[float, float]:
    """The best seconds of each, taking turns."""
    old, new = [], []
    for _ in range(7):
        old.append(seconds(lambda: before.encode_documents(texts)))
        new.append(seconds(lambda: after.encode_documents(texts)))
    return min(old), min(new)


def encoding(base: str, corpus: str) -> list[dict]:
    """The encoder's speed with 8,000 new pieces against the base's."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "extended"
        before = Tokenizer(bases()[base])
        extension = ContinuedBPE(new_tokens=PIECES, min_frequency=1)
        extend(before.directory, extension, texts_of(corpus, 4_000_000), texts_of("english", 1_000_000), out)
        after = Tokenizer(out)
        for name in (corpus, "english"):
            texts = texts_of(name, 2_000_000)
            size = sum(len(text.encode()) for text in texts) / 1e6
            old, new = _alternately(before, after, texts)
            figures = {"base_mb_per_second": size / old, "extended_mb_per_second": size / new}
            rows.append(
                {"base": base, "learnt": corpus, "text": name, "new_pieces": after.size - before.size}
                | figures
                | {"ratio": old / new}
            )
    return rows


def preparation(corpus: str) -> dict:
    """`prepare` against `tokenizers`, on the same documents."""
    tokenizer, texts = Tokenizer(bases()["SmolLM2"]), texts_of(corpus, 10_000_000)
    ours, theirs, fast = [], [], []
    for _ in range(4):
        with tempfile.TemporaryDirectory() as directory:
            ours.append(seconds(lambda: prepare(corpus, iter(texts), tokenizer, Path(directory))))
        theirs.append(seconds(lambda: tokenizer.backend.encode_batch(texts, add_special_tokens=False)))
        fast.append(seconds(lambda: tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)))
    size = sum(len(text.encode()) for text in texts) / 1e6
    return {
        "text": corpus,
        "documents": len(texts),
        "prepare_mb_per_second": size / min(ours),
        "encode_batch_mb_per_second": size / min(theirs),
        "encode_batch_fast_mb_per_second": size / min(fast),
        "ratio": min(theirs) / min(ours),
    }


def learning(trainer: str) -> dict:
    """One trainer on 100 MB, in this process."""
    texts = all_texts()
    base = Tokenizer(bases()["SmolLM2"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    work = {
        "text alone": lambda: None,
        "continued-bpe": lambda: learn(base, ContinuedBPE(new_tokens=PIECES), texts, texts_of("english", 1_000_000)),
        "tokenizers BpeTrainer": lambda: _train_tokenizers(base, texts),
        "SentencePiece": lambda: _train_sentencepiece(texts),
    }[trainer]
    taken = seconds(work)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"trainer": trainer, "seconds": taken, "peak_gb": peak, "text_gb": before, "documents": len(texts)}


def _train_tokenizers(base: Tokenizer, texts: list[str]) -> None:
    import tokenizers

    domain = tokenizers.Tokenizer(tokenizers.models.BPE())
    domain.pre_tokenizer = base.backend.pre_tokenizer  # type: ignore[assignment]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=PIECES, min_frequency=2, show_progress=False)  # type: ignore[call-arg]
    domain.train_from_iterator(texts, trainer)


def _train_sentencepiece(texts: list[str]) -> None:
    import io

    from sentencepiece import SentencePieceTrainer

    lines = (line for text in texts for line in text.splitlines() if line.strip())
    SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=io.BytesIO(),
        model_type="bpe",
        # It keeps every character as a piece: 9,400 of them here.
        vocab_size=PIECES + 9_500,
        byte_fallback=True,
        character_coverage=0.9995,
        hard_vocab_limit=False,
        num_threads=2,
        minloglevel=2,
    )


def _table(rows: list[dict]) -> str:
    names = list(rows[0])
    cells = [
        [
            f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
            for value in row.values()
        ]
        for row in rows
    ]
    head = [name.replace("_", " ").replace("mb per second", "MB/s").replace("gb", "GB") for name in names]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(names), *cells])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("encoding", "preparation", "learning"))
    parser.add_argument("--trainer", choices=TRAINERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.trainer:
        print(json.dumps(learning(arguments.trainer)))
        return
    results = json.loads(OUT.read_text()) if OUT.exists() else {}
    results["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
    parts: dict[str, Callable[[], list[dict]]] = {
        "encoding": lambda: [row for base, corpus in ENCODED for row in encoding(base, corpus)],
        "preparation": lambda: [preparation(corpus) for corpus in ("statutes", "english", "python")],
        "learning": lambda: [_in_a_process(trainer) for trainer in TRAINERS],
    }
    for name, measure in parts.items():
        if arguments.only in (None, name):
            say(f"benchmark: {name}")
            results[name] = measure()
            OUT.parent.mkdir(exist_ok=True)
            write_json_atomic(OUT, results)
            print(f"\n{name}\n\n{_table(results[name])}", flush=True)


def _in_a_process(trainer: str) -> dict:
    say(f"benchmark: {trainer}")
    command = [sys.executable, "-m", "benchmarks.tokenizer", "--trainer", trainer]
    figures = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    say(f"benchmark: {figures.strip()}")
    return json.loads(figures)


if __name__ == "__main__":
    main()
