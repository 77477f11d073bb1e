"""Reading and writing a model directory, beside transformers, on the same files.

    python -m benchmarks.loading [--large] [--only read|write] | --transpose

Prints a Markdown table and writes benchmarks/results/loading.json. Each measurement has a process of its own: seconds are the best of three, with
the files in the page cache; memory is the process's peak, less what it took after its imports, over the size of the weights in the type they are
loaded in. `--transpose` measures the copy of a transposed matrix alone. `--large` adds a model of Llama 3.2 1B's shape (random numbers, bfloat16, two files).
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.shapes import GGUF, SHAPES, peak_resident, write_random
from cpt_jax.core.progress import quiet_libraries, say
from cpt_jax.core.storage import write_json_atomic

OUT = Path("benchmarks/results/loading.json")


def measure(what: str, directory: Path, dtype: str) -> dict:
    """Seconds and peak memory of one way to read or write, in this process."""
    ours = what.startswith("cpt_jax")
    if ours:
        import jax

        from cpt_jax.checkpoint.hf_write import save
        from cpt_jax.core.precision import Precision
        from cpt_jax.recipe.model import load_model

        precision = Precision(compute=dtype)  # type: ignore[arg-type]

        def read():
            model = load_model(directory)
            return model, jax.block_until_ready(model.on_device(precision))

        def write(loaded, out):
            model, weights = loaded
            save(out, model.config, weights, model.hf_config, directory, dtype=np.dtype(precision.dtype))

    else:
        import torch
        from transformers import AutoModelForCausalLM

        def read():
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
            # Mapped pages are not in memory yet: touch them, as a first forward pass would.
            for parameter in model.parameters():
                parameter.data.view(torch.uint8).flatten()[::4096].sum().item()
            return model

        def write(loaded, out):
            loaded.save_pretrained(out)

    quiet_libraries()
    before, seconds = peak_resident(), []
    loaded = read() if "write" in what else None
    if loaded is not None:
        before = peak_resident()
    for _ in range(3):
        started = time.perf_counter()
        if loaded is None:
            read()
        else:
            out = Path(tempfile.mkdtemp(dir=directory.parent)) / "out"
            write(loaded, out)
            shutil.rmtree(out.parent)
        seconds.append(time.perf_counter() - started)
        if len(seconds) == 1:
            peak = peak_resident()
    return {"what": what, "dtype": dtype, "seconds": min(seconds), "peak_bytes": peak - before}


def print_transposes() -> None:
    """GB/s of NumPy's copy and ours, of a matrix as large as a feed-forward's."""
    import ml_dtypes

    from cpt_jax.core.transpose import transposed

    for dtype in (ml_dtypes.bfloat16, np.float32):
        matrix = np.random.default_rng(0).standard_normal((8192, 2048), np.float32).astype(dtype)
        rates = []
        for function in (lambda m: np.ascontiguousarray(m.T), transposed):
            seconds = []
            for _ in range(5):
                started = time.perf_counter()
                function(matrix)
                seconds.append(time.perf_counter() - started)
            rates.append(matrix.nbytes / min(seconds) / 1e9)
        print(f"{np.dtype(dtype).name}: NumPy {rates[0]:.2f} GB/s, by blocks {rates[1]:.2f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--transpose", action="store_true")
    parser.add_argument("--only", choices=("read", "write"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        what, directory, dtype = arguments.one
        print(json.dumps(measure(what, Path(directory), dtype)))
        return
    if arguments.transpose:
        print_transposes()
        return
    results = []
    with tempfile.TemporaryDirectory() as root:
        from cpt_jax.checkpoint.gguf import import_gguf

        models = {"SmolLM2-135M, float32 files": (Path(root) / "small", "float32")}
        import_gguf(GGUF, Path(root) / "small")
        if arguments.large:
            say("writing the large model")
            write_random(Path(root) / "large", SHAPES["1b"])
            models["Llama 3.2 1B's shape, bfloat16 files"] = (Path(root) / "large", "bfloat16")
        for name, (directory, dtype) in models.items():
            size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
            for action in ("read", "write") if not arguments.only else (arguments.only,):
                for library in ("cpt_jax", "transformers"):
                    say(f"{name}: {library} {action}")
                    command = [
                        sys.executable,
                        "-m",
                        "benchmarks.loading",
                        "--one",
                        f"{library} {action}",
                        directory,
                        dtype,
                    ]
                    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
                    found = json.loads(done.stdout.splitlines()[-1])
                    results.append({"model": name, "bytes": size, **found, "share": found["peak_bytes"] / size})
    print("| model | | seconds | GB/s | peak memory over the weights' size |\n|---|---|---|---|---|")
    for row in results:
        rate = row["bytes"] / row["seconds"] / 1e9
        print(f"| {row['model']} | {row['what']} | {row['seconds']:.2f} | {rate:.2f} | {row['share']:.2f} |")
    write_json_atomic(OUT, {"machine": platform.processor() or platform.machine(), "results": results})


if __name__ == "__main__":
    main()
