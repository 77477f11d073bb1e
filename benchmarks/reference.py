"""A finished run against transformers and torch, which share no code with it: logits, bits per byte, greedy text, old
rows, round trip.

    python -m benchmarks.reference runs/quickstart

Exit 1 when one of them is off.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt_jax.core.config import from_json
from cpt_jax.core.precision import FLOAT32
from cpt_jax.data.holdout import read_heldout, training_documents
from cpt_jax.data.sources import SkipCounts
from cpt_jax.evaluate.bits_per_byte import bits_per_byte, pack_documents
from cpt_jax.models.generate import generate
from cpt_jax.recipe.export import text_logits
from cpt_jax.recipe.model import load_model
from cpt_jax.recipe.recipe import Recipe
from cpt_jax.vocab.gate import fuzzed_texts
from cpt_jax.vocab.tokenizer import Tokenizer

EMBEDDING = "model.embed_tokens.weight"


class Checks:
    """Prints each check and remembers whether all held."""

    def __init__(self) -> None:
        self.all_held = True

    def __call__(self, what: str, held: bool) -> None:
        print(f"{'ok ' if held else 'BAD'} {what}", flush=True)
        self.all_held &= held


def torch_bits_per_byte(model, start_id: int, tokenizer, documents: list[str]) -> float:
    """One document after the other, each whole."""
    nats, size = 0.0, 0
    for document in documents:
        ids = [start_id, *tokenizer(document, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
        nats -= logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum().item()
        size += len(document.encode())
    return nats / size / math.log(2)


def check_model(check: Checks, run: Path, recipe: Recipe, directory: Path, stage: str) -> None:
    """One model directory: the base as it came, or the export."""
    tokenizer, ours = Tokenizer(directory), load_model(directory)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    reader = AutoTokenizer.from_pretrained(directory)
    told = [entry for entry in json.loads((run / "eval.json").read_text()) if entry["stage"] == stage]
    told = {entry["domain"]: entry for entry in told if entry["weights"] == "last"}
    weights = ours.on_device(FLOAT32)
    for domain in recipe.domains:
        documents = read_heldout(run / "data" / domain.name)
        ids = [tokenizer.start_id, *tokenizer.encode(documents[0])][:128]
        with torch.no_grad():
            exact = reference.double()(torch.tensor([ids])).logits[0].numpy()
            single = reference.float()(torch.tensor([ids])).logits[0].numpy()
        double, rounded = (
            np.abs(text_logits(ours, [ids])[0] - exact).max(),
            np.abs(text_logits(ours, [ids], FLOAT32)[0] - single).max(),
        )
        check(
            f"{stage}, {domain.name}: logits differ by {double:.1e} in float64, {rounded:.1e} in float32", double < 1e-4
        )
        length = recipe.evaluation.sequence_length
        short = [text for text in documents if len(tokenizer.encode(text)) <= length]
        expected = torch_bits_per_byte(reference, tokenizer.start_id, reader, short)
        packed = pack_documents(tokenizer, short, length)
        found = bits_per_byte(ours.network, weights, packed, batch_size=4, precision=FLOAT32).bits_per_byte
        if len(short) == len(documents):
            check(
                f"{stage}, {domain.name}: eval.json has these bits per byte",
                abs(told[domain.name]["bits_per_byte"] - found) < 5e-4,
            )
        check(f"{stage}, {domain.name}: {found:.4f} bits per byte, torch {expected:.4f}", abs(found - expected) < 5e-4)
    for prompt in recipe.samples.prompts:
        ids = [tokenizer.start_id, *tokenizer.encode(prompt)]
        count = recipe.samples.new_tokens
        with torch.no_grad():
            tensor = torch.tensor([ids])
            found = reference.generate(
                tensor,
                attention_mask=torch.ones_like(tensor),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=tokenizer.end_id,
                pad_token_id=tokenizer.end_id,
            )
        expected = [index for index in found[0].tolist()[len(ids) :] if index != tokenizer.end_id]
        [produced] = generate(ours.network, weights, [ids], new_tokens=count, end_ids=(tokenizer.end_id,))
        check(f"{stage}: greedy text after {prompt!r} is that of transformers", produced == expected)


def check_vocabulary(check: Checks, run: Path, recipe: Recipe, source: Path) -> None:
    old = load_file(source / "model.safetensors")[EMBEDDING]
    new = load_file(run / "export" / "model.safetensors")[EMBEDDING]
    check(f"{len(old):,} old rows of {len(new):,} are bit-identical", old.tobytes() == new[: len(old)].tobytes())
    base, extended = Tokenizer(source), Tokenizer(run / "export")
    reader = AutoTokenizer.from_pretrained(run / "export")
    for domain in recipe.domains:
        texts = training_documents(domain.corpus, domain.heldout, run / "data" / domain.name, SkipCounts())
        documents = [text for _, text in zip(range(1000), texts, strict=False)] or read_heldout(
            run / "data" / domain.name
        )
        lost = sum(
            extended.decode(ids) != text
            for ids, text in zip(extended.encode_documents(documents), documents, strict=True)
        )
        differ = sum(reader(text, add_special_tokens=False)["input_ids"] != extended.encode(text) for text in documents)
        check(
            f"{domain.name}: {lost} of {len(documents)} documents do not come back, {differ} are cut otherwise by AutoTokenizer",
            not lost and not differ,
        )
    texts = fuzzed_texts(5000, seed=7)
    lost = sum(extended.decode(extended.encode(t)) != t and base.decode(base.encode(t)) == t for t in texts)
    check(f"{lost} of {len(texts)} arbitrary Unicode texts come back from the base alone", not lost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    recipe = from_json(Recipe, json.loads((run / "config.json").read_text()))
    source = run / "source" if (run / "source").exists() else Path(recipe.base)
    check = Checks()
    check_model(check, run, recipe, source, "base")
    check_model(check, run, recipe, run / "export", recipe.stages[-1].name)
    check_vocabulary(check, run, recipe, source)
    sys.exit(0 if check.all_held else 1)


if __name__ == "__main__":
    main()
