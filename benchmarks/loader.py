"""Tokens a second of the loader alone, of short and long documents, beside a plain peer: torch's DataLoader over the
same files, with greedy packing.

`python -m benchmarks.loader`; with `--profile` also where the time goes.
"""

import argparse
import cProfile
import json
import platform
import pstats
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cpt_jax.core.storage import write_json_atomic
from cpt_jax.data.loader import Loader
from cpt_jax.data.prepare import decode_record, prepare, read_manifest

RESULTS = Path(__file__).parent / "results"
STATUTES = Path(".cache/quickstart/statutes.jsonl")
ROWS = {256: 32, 2048: 8, 8192: 8}
# A full step of a 1B model on an H200 takes 65,643 (`benchmarks.train_step`): 20 times as many.
WANTED = 20 * 65_643


class Pairs:
    """Two bytes of a text are a token: statutes have some 100 to 130 a document then."""

    fingerprint = "pairs"

    def encode_documents(self, documents: list[str]) -> list[np.ndarray]:
        found = []
        for text in documents:
            raw = text.encode("utf-16-le")
            found.append(np.frombuffer(raw, "<u2").astype(np.uint32))
        return found


class Drawn:
    """Texts that are numbers of tokens, each drawn."""

    fingerprint = "pairs"

    def __init__(self) -> None:
        self._generator = np.random.default_rng(0)

    def encode_documents(self, documents: list[str]) -> list[np.ndarray]:
        return [self._generator.integers(2, 50_000, int(size)).astype(np.uint32) for size in documents]


def prepared(root: Path) -> dict[str, Path]:
    """Short articles (real statutes, several times, so that a run reads new ones) and long documents."""
    statutes = [json.loads(line)["text"] for line in STATUTES.read_text().splitlines()]
    times = -(-100_000 // len(statutes))
    prepare("short", (text for _ in range(times) for text in statutes), Pairs(), root / "short")
    lengths = np.random.default_rng(1).lognormal(np.log(4000) - 0.5, 1.0, 4000).astype(int) + 1
    prepare("long", map(str, lengths), Drawn(), root / "long")
    return {name: root / name for name in ("short", "long")}


def ours(directories: dict[str, Path], mixture: dict[str, float], length: int, **how) -> Iterator[int]:
    """Tokens of each batch."""
    loader = Loader(
        mixture,
        directories,
        sequence_length=length,
        batch_size=ROWS[length],
        start_id=0,
        end_id=1,
        tokenizer="pairs",
        seed=0,
        **how,
    )
    try:
        for batch in loader:
            yield int((batch["segment_ids"] > 0).sum())
    finally:
        loader.close()


def torch_loader(directories: dict[str, Path], mixture: dict[str, float], length: int, workers: int) -> Iterator[int]:
    """Documents shuffled and read by a DataLoader; rows filled one after the other, long documents split. Of one
    domain; it keeps no position, and no share of tokens."""
    import torch
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    class Source(torch.utils.data.Dataset):
        def __init__(self, directory: Path) -> None:
            self._records = ArrayRecordDataSource(sorted(map(str, directory.glob("*.arrayrecord"))))

        def __len__(self) -> int:
            return len(self._records)

        def __getitem__(self, index: int) -> np.ndarray:
            return self.__getitems__([index])[0]

        def __getitems__(self, indices: list[int]) -> list[np.ndarray]:
            return [decode_record(record)[0] for record in self._records.__getitems__(indices)]

    [name] = mixture
    generator = torch.Generator().manual_seed(0)
    source = torch.utils.data.DataLoader(
        Source(directories[name]),
        batch_size=256,
        shuffle=True,
        generator=generator,
        num_workers=workers,
        collate_fn=lambda documents: documents,
    )
    fields = ("inputs", "targets", "positions", "segment_ids")
    while True:
        batch, row, used, segment = {f: np.zeros((ROWS[length], length), np.int32) for f in fields}, 0, 0, 1
        for documents in source:
            for tokens in documents:
                framed = np.concatenate([[0], tokens, [1]]).astype(np.int32)
                for first in range(0, len(framed) - 1, length):
                    piece = framed[first : first + length + 1]
                    size = len(piece) - 1
                    if used + size > length:
                        row, used, segment = row + 1, 0, 1
                    if row == ROWS[length]:
                        yield int((batch["segment_ids"] > 0).sum())
                        batch, row = {f: np.zeros((ROWS[length], length), np.int32) for f in fields}, 0
                    place = slice(used, used + size)
                    batch["inputs"][row, place], batch["targets"][row, place] = piece[:-1], piece[1:]
                    batch["positions"][row, place] = np.arange(size)
                    batch["segment_ids"][row, place] = segment
                    used, segment = used + size, segment + 1


def rate(batches: Iterator[int], seconds: float) -> float:
    """Tokens a second, after the first batches."""
    for _ in range(4):
        next(batches)
    tokens, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        tokens += next(batches)
    return tokens / (time.perf_counter() - started)


def fullness(batches: Iterator[int], length: int) -> float:
    """Of 50 batches' places, the share that holds a token."""
    return sum(next(batches) for _ in range(50)) / (50 * length * ROWS[length])


def profiled(directories: dict[str, Path]) -> None:
    """The packing of 200 groups, without the thread."""
    import grain

    loader = Loader(
        {"short": 1.0}, directories, sequence_length=2048, batch_size=8, start_id=0, end_id=1, tokenizer="pairs", seed=0
    )
    assert isinstance(loader._iterator, grain.DatasetIterator)
    rows = loader._iterator._parent._parent  # pyright: ignore
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(64 * 20):
        next(rows)
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(16)
    loader.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "loader.json")
    arguments = parser.parse_args()
    # torch forks its workers while jax's threads are there; they use neither.
    warnings.filterwarnings("ignore", message=".*fork.*")
    root = Path(tempfile.mkdtemp())
    try:
        directories = prepared(root)
        mean = {n: (m := read_manifest(d)).tokens / m.records for n, d in directories.items()}
        if arguments.profile:
            profiled(directories)
        cases = []
        for name, mixture in (
            ("short", {"short": 1.0}),
            ("long", {"long": 1.0}),
            ("both", {"short": 0.5, "long": 0.5}),
        ):
            for length in ROWS:
                found = {"documents": name, "sequence_length": length}
                for packing in ("best fit", "concatenate"):
                    found[packing] = rate(ours(directories, mixture, length, packing=packing), arguments.seconds)
                    found[f"{packing}, full"] = fullness(ours(directories, mixture, length, packing=packing), length)
                found["apart"] = rate(ours(directories, mixture, length, pack_domains="apart"), arguments.seconds)
                if len(mixture) == 1:
                    for workers in (0, 2):
                        found[f"torch, {workers} workers"] = rate(
                            torch_loader(directories, mixture, length, workers), arguments.seconds
                        )
                cases.append(found)
                print(
                    " ".join(f"{k}={v:,.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in found.items()),
                    flush=True,
                )
        write_json_atomic(
            arguments.out,
            {
                "machine": platform.processor() or platform.machine(),
                "mean_tokens": mean,
                "wanted": WANTED,
                "cases": cases,
            },
        )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
