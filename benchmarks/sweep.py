"""Six small runs that differ in ratio, learning rate and seed: one after the other, several processes at once, and as one
program.

    python -m benchmarks.sweep [--steps 60] [--rows 8] [--compute bfloat16] [--at-once 2] [--runs 6] [--method full|lora]

A model of 5M random weights, rows of 256, AdamW, with an EMA; text and tokenizer are made here. Each way is one call of
`cpt sweep` in a new process without JAX's cache of compiled programs: seconds of the whole call (start, preparing, compiling, training,
checkpoints, evaluation), and of its stages alone (with compiling). Prints a Markdown table and writes
benchmarks/results/sweep-DEVICE.json.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cpt_jax.adapt import Full, LoRA
from cpt_jax.core.precision import Precision
from cpt_jax.core.progress import say
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.data.holdout import Holdout
from cpt_jax.data.sources import Corpus
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.recipe.recipe import Domain, Evaluation, Recipe, Stage

# Where the experiment finds its inputs and settings, in the processes that the benchmark starts.
PLACE = "CPT_SWEEP_BENCHMARK"
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "vocab_size": 1024,
    "hidden_size": 320,
    "intermediate_size": 896,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "head_dim": 64,
}


def runs() -> list[Recipe]:
    """Half as many shares as runs, each with two seeds and learning rates."""
    place = Path(os.environ[PLACE])
    settings = json.loads((place / "settings.json").read_text())
    held = Holdout(share=0.02, max_bytes=20_000)
    domains = tuple(
        Domain(corpus=Corpus(name=name, spec=str(place / f"{name}.jsonl")), role=role, heldout=held)
        for name, role in (("new", "new"), ("old", "replay"))
    )
    recipes = []
    for number in range(settings["runs"]):
        share = 0.05 * (1 + number // 2)
        stage = Stage(
            name="train",
            method=Full() if settings["method"] == "full" else LoRA(rank=16, alpha=32, new_rows=False),
            mixture={"new": 1 - share, "old": share},
            tokens=settings["steps"] * settings["rows"] * 256,
            batch_size=settings["rows"],
            sequence_length=256,
            optimizer=AdamW(learning_rate=(1e-3, 3e-4)[number % 2]),
            ema=EMA(decay=0.99),
        )
        recipes.append(
            Recipe(
                name=f"replay-{share:.2f}-{number % 2}",
                base=str(place / "base"),
                domains=domains,
                stages=(stage,),
                precision=Precision(compute=settings["compute"]),
                evaluation=Evaluation(sequence_length=256, batch_size=32),
                seed=number % 2,
            )
        )
    return recipes


def write_inputs(place: Path, settings: dict) -> None:
    """Two domains of made-up words, a tokenizer of 1,024 pieces, and a model of random numbers."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from benchmarks.shapes import write_random

    write_json_atomic(place / "settings.json", settings)
    generator, texts = random.Random(0), {}
    for name, letters in (("new", "bdfgklmnprst"), ("old", "chjlmnqrstvw")):
        words = ["".join(generator.choice(letters) + generator.choice("aeiou") for _ in range(3)) for _ in range(800)]
        texts[name] = [" ".join(generator.choices(words, k=generator.randint(20, 120))) for _ in range(4000)]
        lines = (json.dumps({"text": text}) + "\n" for text in texts[name])
        (place / f"{name}.jsonl").write_text("".join(lines))
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts["new"][:500] + texts["old"][:500], trainer)
    base = place / "base"
    base.mkdir()
    special = {name: "<|endoftext|>" for name in ("eos_token", "bos_token")}
    tokenizer.save(str(base / "tokenizer.json"))
    write_json_atomic(base / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
    write_random(base, SHAPE | {"bos_token_id": 0, "eos_token_id": 0})


def measure(place: Path, name: str, *flags: str) -> dict:
    out = place / name
    command = [sys.executable, "-m", "cpt_jax", "sweep", "benchmarks.sweep:runs", "--workdir", str(out), *flags]
    environment = os.environ | {PLACE: str(place), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-3000:]}")
    files = list(out.glob("runs/*/stages/1-train/metrics.jsonl"))
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    runs = json.loads((out / "sweep.json").read_text())["runs"]
    # Of runs that go together, each has the whole time of its steps.
    of_all = [
        sum(line["seconds"] for line in of_run) / run["together"] for of_run, run in zip(lines, runs, strict=True)
    ]
    compiling = [of_run[0]["compile_seconds"] / run["together"] for of_run, run in zip(lines, runs, strict=True)]
    tokens = sum(line["tokens"] for of_run in lines for line in of_run)
    return {
        "way": name,
        "seconds": seconds,
        "training_seconds": sum(of_all),
        "compile_seconds": sum(compiling),
        "tokens": tokens,
        "final_loss": {file.parents[2].name: of_run[-1]["loss"] for file, of_run in zip(files, lines, strict=True)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument(
        "--ways", nargs="+", choices=("together", "one", "at-once"), default=["together", "one", "at-once"]
    )
    arguments = parser.parse_args()
    flags = {
        "together": ("--together", str(arguments.runs)),
        "one": ("--together", "never"),
        "at-once": ("--at-once", str(arguments.at_once)),
    }
    lines = [
        "| way | seconds in all | of stages | of that compiling | tokens/s without compiling |",
        "|---|---|---|---|---|",
    ]
    results = []
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        write_inputs(place, {name: getattr(arguments, name) for name in ("steps", "rows", "runs", "method", "compute")})
        for way in arguments.ways:
            results.append(found := measure(place, way, *flags[way]))
            training = found["training_seconds"] - found["compile_seconds"]
            # Processes at once share the machine: their seconds overlap.
            if way == "at-once":
                training /= arguments.at_once
            shown = [way, f"{found['seconds']:.1f}", f"{found['training_seconds']:.1f}"]
            shown += [f"{found['compile_seconds']:.1f}", f"{found['tokens'] / training:,.0f}"]
            lines.append("| " + " | ".join(shown) + " |")
            say(lines[-1])
    print("\n".join(lines))
    import jax

    device = jax.devices()[0].device_kind
    machine = {"device": device, "cores": os.cpu_count(), "python": platform.python_version(), "jax": jax.__version__}
    out = Path("benchmarks/results") / f"sweep-{device.replace(' ', '-')}.json"
    write_json_atomic(out, {"machine": machine, "arguments": vars(arguments), "results": results})
    say(str(out))


if __name__ == "__main__":
    main()
