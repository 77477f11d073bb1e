"""Text to token ids on disk: `cpt data prepare` beside `datasets.map`, with the same tokenizer.

    python -m benchmarks.data_prepare [--megabytes 64] [--tries 2] | --memory 1000 | --loader

Prints a Markdown table and writes benchmarks/results/data_prepare.json. The corpus is real text (the quickstart's statutes, Wikipedia and code: `make
inputs`), put together at random into JSON lines. Each way has a process of its own, taken in turns; the best of the tries counts. Seconds of cores are
those of all its processes, which other programs on the machine change less. `--memory`: the peak of a larger corpus too. `--loader`: documents that the
loader decodes in a second, in the records as they are and as the bare array that they were.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from cpt_jax.core.progress import say
from cpt_jax.core.storage import write_json_atomic

OUT = Path("benchmarks/results/data_prepare.json")
TOKENIZER = Path(".cache/models/SmolLM2-135M-Instruct.Q4_1")
TEXTS = Path(".cache/quickstart")
WAYS = {
    "cpt data prepare, 1 worker": ["cpt", "1"],
    "cpt data prepare, 2 workers": ["cpt", "2"],
    "datasets.map, num_proc=1": ["datasets", "1"],
    "datasets.map, num_proc=2": ["datasets", "2"],
}


def write_corpus(path: Path, size: int) -> int:
    """Real documents, one or several of them in a line; how many lines."""
    source = [json.loads(line)["text"] for file in sorted(TEXTS.glob("*.jsonl")) for line in file.open()]
    generator, written, count = random.Random(0), 0, 0
    with path.open("w") as out:
        while written < size:
            text = "\n".join(generator.choices(source, k=generator.randint(1, 12)))[generator.randint(0, 100) :]
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            out.write(line)
            written, count = written + len(line.encode()), count + 1
    return count


def prepare(way: str, workers: int, corpus: Path, out: Path) -> None:
    """One way, in this process."""
    if way == "cpt":
        from cpt_jax.cli import main

        given = ["--tokenizer", TOKENIZER, "--input", f"c={corpus}", "--out", out, "--workers", workers]
        main(["data", "prepare", *map(str, given)])
        return
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    cache = str(out / "cache")
    texts = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=cache)
    ids = texts.map(
        lambda batch: {"tokens": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        num_proc=workers if workers > 1 else None,
        remove_columns=texts.column_names,
    )
    ids.save_to_disk(str(out / "tokens"), num_proc=workers if workers > 1 else None)


def measured(way: list[str], corpus: Path) -> dict:
    """Seconds, seconds of cores, and the peak of the memory of all its processes (what they share counted once)."""
    with tempfile.TemporaryDirectory(dir=corpus.parent) as out:
        command = [sys.executable, "-m", "benchmarks.data_prepare", "--one", *way, str(corpus), out]
        before, started, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, sum(map(_proportional_bytes, _family(process.pid))))
            time.sleep(0.1)
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0, command
    cores = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "core_seconds": cores, "peak_bytes": peak}


def _family(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [pid, *(each for child in children for each in _family(child))]


def _proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def loader_rates() -> dict[str, float]:
    """Documents a second that are decoded, of 300 tokens each."""
    from cpt_jax.data.prepare import NOT_LEARNT, decode_record, encode_record

    def bare(record: bytes) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.frombuffer(record, "<u4")
        return (tokens & (NOT_LEARNT - 1)).astype(np.int32), tokens < NOT_LEARNT

    tokens = np.arange(300, dtype="<u4")
    rates = {}
    for name, decode, record in (
        ("as TFDS reads it", decode_record, encode_record(tokens)),
        ("bare array", bare, tokens.tobytes()),
    ):
        best = float("inf")
        for _ in range(7):
            started = time.perf_counter()
            for _ in range(20_000):
                decode(record)
            best = min(best, time.perf_counter() - started)
        rates[name] = 20_000 / best
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--tries", type=int, default=2)
    parser.add_argument("--memory", type=int, metavar="MEGABYTES")
    parser.add_argument("--loader", action="store_true")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        way, workers, corpus, out = arguments.one
        prepare(way, int(workers), Path(corpus), Path(out))
        return
    if arguments.loader:
        print(", ".join(f"{name}: {rate:,.0f} documents/s" for name, rate in loader_rates().items()))
        return
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as root:
        size = arguments.memory or arguments.megabytes
        corpus = Path(root) / "corpus.jsonl"
        documents, bytes_of_it = write_corpus(corpus, size * 10**6), corpus.stat().st_size
        ways = {name: way for name, way in WAYS.items() if not arguments.memory or name.startswith("cpt")}
        for attempt in range(1 if arguments.memory else arguments.tries):
            for name, way in ways.items():
                say(f"{name}, try {attempt + 1}, load {os.getloadavg()[0]:.1f}")
                new = measured(way, corpus)
                best = found.get(name, new)
                found[name] = {key: min(best[key], new[key]) for key in new} | {
                    "peak_bytes": max(best["peak_bytes"], new["peak_bytes"])
                }
    print("| | seconds | documents/s | MB/s | MB per second of a core | peak memory, MB |\n|---|---|---|---|---|---|")
    for name, row in found.items():
        rate, of_core = bytes_of_it / 1e6 / row["seconds"], bytes_of_it / 1e6 / row["core_seconds"]
        print(
            f"| {name} | {row['seconds']:.1f} | {documents / row['seconds']:,.0f} | {rate:.2f} | {of_core:.2f} | {row['peak_bytes'] / 1e6:,.0f} |"
        )
    if not arguments.memory:
        packages = ("tokenizers", "datasets", "transformers", "array_record", "numpy")
        about = {
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        }
        about |= {
            "command": "python -m " + " ".join(["benchmarks.data_prepare", *sys.argv[1:]]),
            "versions": {name: version(name) for name in packages},
        }
        about |= {"corpus": {"bytes": bytes_of_it, "documents": documents}, "load": os.getloadavg()}
        write_json_atomic(OUT, about | {"results": found})


if __name__ == "__main__":
    main()
