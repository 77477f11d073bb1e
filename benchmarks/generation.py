"""Greedy text and the speed of text, greedy or drawn: ours, and transformers' generate on torch, float32 on the CPU.

    python -m benchmarks.generation [--base FILE.gguf]

Prints a Markdown table and writes benchmarks/results/generation-BASE.json; 10 minutes on two cores. Ten prompts of different lengths are
continued by 200 tokens: ours as rows of one batch, transformers one after the other. Where they part, the table of differences says after how many
tokens, and how far apart the two tokens' logits were for torch. Speed is that of whole calls after one call to compile, the better of two, taking
turns; torch has one thread or all, whichever is faster.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from cpt_jax.checkpoint.gguf import import_gguf
from cpt_jax.core.precision import Precision
from cpt_jax.core.progress import quiet_libraries, say
from cpt_jax.core.storage import write_json_atomic
from cpt_jax.models.generate import generate
from cpt_jax.models.sampling import Sampling
from cpt_jax.recipe.model import load_model
from cpt_jax.vocab.tokenizer import Tokenizer

GGUF = Path(".cache/quickstart/SmolLM2-135M-Instruct.Q4_1.gguf")
NEW_TOKENS = 200
# (rows, tokens, how they are drawn).
SPEEDS = (
    (1, 64, {}),
    (8, 64, {}),
    (8, 64, {"temperature": 1.0, "top_p": 0.95}),
    (32, 256, {"temperature": 1.0}),
)
PROMPTS = (
    "The",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, there lived a fisherman who",
    "Water boils at 100 degrees Celsius at sea level because",
    "中华人民共和国",
    "Q: What is the difference between a virus and a bacterium?\nA:",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "<|im_start|>user\nWrite a short poem about autumn.<|im_end|>\n<|im_start|>assistant\n",
    "In economics, inflation is a general increase in the prices of goods and services. When the general price level rises, each unit "
    "of currency buys fewer goods and services; consequently, inflation corresponds to a reduction in the purchasing power of money. "
    "The common measure of inflation is the inflation rate, the annualized percentage change in a general price index. Central banks",
)


class Theirs:
    """transformers' generate."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def __call__(self, prompts: list[list[int]], new_tokens: int, **drawn: float) -> list[list[int]]:
        """Prompts of one length."""
        ids = torch.tensor(prompts)
        settings = dict(max_new_tokens=new_tokens, do_sample=bool(drawn), eos_token_id=None, pad_token_id=0)
        settings |= {"top_k": 0} | drawn if drawn else {}
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, ids.shape[1] :].tolist()

    def logits(self, ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0, -1].numpy()


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def best_threads(theirs: Theirs, prompts: list[list[int]]) -> int:
    """One thread, or as many as torch takes by itself: on a busy machine, threads that wait for each other cost more."""
    taken = {}
    for threads in {1, torch.get_num_threads()}:
        torch.set_num_threads(threads)
        theirs(prompts, 2)
        taken[threads] = seconds(lambda: theirs(prompts, 8))
    best = min(taken, key=taken.__getitem__)
    torch.set_num_threads(best)
    return best


def speed(ours: Callable, theirs: Theirs, prompt: list[int], batch: int, tokens: int, drawn: dict) -> dict:
    prompts = [prompt] * batch
    threads = best_threads(theirs, prompts)
    ours(prompts, tokens, **drawn)
    times: dict[str, list[float]] = {"ours": [], "transformers": []}
    for _ in range(2):
        times["ours"].append(seconds(lambda: ours(prompts, tokens, **drawn)))
        times["transformers"].append(seconds(lambda: theirs(prompts, tokens, **drawn)))
    rates = {name: batch * tokens / min(taken) for name, taken in times.items()}
    found = {"batch": batch, "tokens": tokens, **drawn, **rates, "torch_threads": threads, "load": os.getloadavg()[0]}
    say(f"{batch} rows of {tokens} tokens {drawn or 'greedy'}: {found['ours']:.1f}, {found['transformers']:.1f}")
    return found


def comparison(ours: Callable, theirs: Theirs, prompts: list[list[int]]) -> list[dict]:
    """Each prompt's equal tokens, and what was at the first that is not."""
    results = []
    for prompt, found in zip(prompts, ours(prompts, NEW_TOKENS), strict=True):
        [expected] = theirs([prompt], NEW_TOKENS)
        pairs = zip(found, expected, strict=True)
        equal = next((place for place, (a, b) in enumerate(pairs) if a != b), NEW_TOKENS)
        result: dict = {"prompt_tokens": len(prompt), "equal_tokens": equal}
        if equal < NEW_TOKENS:
            logits = theirs.logits(prompt + expected[:equal])
            result["logits_apart"] = float(logits[expected[equal]] - logits[found[equal]])
        results.append(result)
        say(f"{len(prompt)} prompt tokens: {equal} of {NEW_TOKENS} equal")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=GGUF, help="a model as GGUF file (%(default)s)")
    base = parser.parse_args().base
    quiet_libraries()
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root) / "model"
        import_gguf(base, directory)
        tokenizer, model = Tokenizer(directory), load_model(directory)
        network, weights, theirs = model.network, model.on_device(Precision(compute="float32")), Theirs(directory)
        prompts = [[tokenizer.start_id, *tokenizer.encode(text)] for text in PROMPTS]

        def ours(prompts: list[list[int]], new_tokens: int, **drawn: float) -> list[list[int]]:
            return generate(network, weights, prompts, new_tokens=new_tokens, sampling=Sampling(**drawn))

        speeds = [speed(ours, theirs, prompts[3], *each) for each in SPEEDS]
        torch.set_num_threads(best_threads(theirs, prompts[:1]))
        compared = comparison(ours, theirs, prompts)
    print("| tokens per second | ours | transformers | ratio |\n|---|---|---|---|")
    for row in speeds:
        ratio = row["ours"] / row["transformers"]
        drawn = ", ".join(f"{name} {row[name]}" for name in ("temperature", "top_p") if name in row) or "greedy"
        print(
            f"| {row['batch']} x {row['tokens']}, {drawn} | {row['ours']:.1f} | {row['transformers']:.1f} | {ratio:.2f} |"
        )
    same = sum(result["equal_tokens"] == NEW_TOKENS for result in compared)
    print(f"\n{same} of {len(compared)} prompts are continued by the same {NEW_TOKENS} tokens.")
    for row, result in enumerate(compared):
        if "logits_apart" in result:
            print(
                f"Prompt {row}: {result['equal_tokens']} equal tokens, then logits {result['logits_apart']:.2g} apart."
            )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    out = Path(f"benchmarks/results/generation-{base.stem}.json")
    write_json_atomic(out, {"machine": machine, "speed": speeds, "greedy": compared})


if __name__ == "__main__":
    main()
