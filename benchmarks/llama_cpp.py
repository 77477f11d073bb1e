"""A model as `cpt model export-gguf` writes it, in llama.cpp: tokens and logits beside those of the directory.

    pip install llama-cpp-python
    python -m benchmarks.llama_cpp MODEL TEXTS.jsonl [...]

Tokens of every document, of fuzzed texts and of each piece's own text; logits of float32 weights (`--type` of others) at
every position of some documents. Exit 1 when a token of a document
or of a piece differs.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np

from cpt_jax.checkpoint.gguf_write import KINDS, export_gguf
from cpt_jax.core.precision import FLOAT32
from cpt_jax.recipe.export import text_logits
from cpt_jax.recipe.find import find_model
from cpt_jax.recipe.model import load_model
from cpt_jax.vocab.gate import fuzzed_texts
from cpt_jax.vocab.tokenizer import Tokenizer

MOST_TOKENS = 256


def tokens_of(model: llama_cpp.Llama, text: str) -> list[int]:
    return model.tokenize(text.encode(), add_bos=False, special=False)


def compare_tokens(model: llama_cpp.Llama, tokenizer: Tokenizer, what: str, texts: list[str]) -> bool:
    # llama.cpp does not normalize, as Qwen's tokenizer does.
    if (normalizer := tokenizer.backend.normalizer) is not None and tokenizer.sentencepiece is None:
        texts = [normalizer.normalize_str(text) for text in texts]
    differing = [text for text in texts if tokens_of(model, text) != tokenizer.encode(text)]
    print(f"{what}: {len(texts) - len(differing):,} of {len(texts):,} texts have the same tokens", flush=True)
    for text in differing[:3]:
        print(f"  {text[:80]!r}: {tokens_of(model, text)[:20]}, here {tokenizer.encode(text)[:20]}")
    return not differing


def compare_logits(model: llama_cpp.Llama, directory: Path, ids: list[list[int]]) -> None:
    ours = text_logits(load_model(directory), ids, FLOAT32)
    farthest, same, divergence, positions = 0.0, 0, 0.0, 0
    for tokens, expected in zip(ids, ours, strict=True):
        model.reset()
        model.eval(tokens)
        found = np.array(model.scores[: len(tokens)], np.float64)
        farthest = max(farthest, float(np.abs(found - expected).max()))
        same += int((found.argmax(-1) == expected.argmax(-1)).sum())
        p, q = (each - np.logaddexp.reduce(each, -1, keepdims=True) for each in (expected.astype(np.float64), found))
        divergence += float((np.exp(p) * (p - q)).sum())
        positions += len(tokens)
    print(
        f"logits: {positions:,} positions, at most {farthest:.1e} apart, KL {divergence / positions:.1e}, "
        f"the same likeliest token at {same / positions:.2%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a HF directory, or a run's")
    parser.add_argument("texts", nargs="+", type=Path, help='JSON lines with "text"')
    parser.add_argument("--type", choices=KINDS, default="f32")
    parser.add_argument("--documents", type=int, default=8, help="of each file, whose logits are compared")
    arguments = parser.parse_args()
    directory = find_model(arguments.model)
    tokenizer, held = Tokenizer(directory), True
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "model.gguf"
        export_gguf(directory, file, arguments.type)
        print(f"{arguments.type}: {file.stat().st_size / 1e6:,.0f} MB")
        # Keys and values in float32 as here, not in float16.
        exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "logits_all": True}
        model = llama_cpp.Llama(str(file), n_ctx=MOST_TOKENS, n_batch=MOST_TOKENS, verbose=False, **exact)
        ids = []
        for path in arguments.texts:
            texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
            held &= compare_tokens(model, tokenizer, str(path), texts)
            ids += [tokenizer.encode(text)[:MOST_TOKENS] for text in texts[: arguments.documents]]
        # Some differ with the base's tokenizer too.
        compare_tokens(model, tokenizer, "fuzzed", fuzzed_texts(2000))
        pieces = [tokenizer.piece_bytes(index).decode(errors="ignore") for index in range(tokenizer.size)]
        held &= compare_tokens(model, tokenizer, "pieces", pieces)
        compare_logits(model, directory, ids)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
