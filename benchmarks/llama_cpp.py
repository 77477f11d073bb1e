"""A model as `cpt model export-gguf` writes it, in llama.cpp: tokens and logits beside those of the directory.

    pip install llama-cpp-python
    python -m benchmarks.llama_cpp MODEL TEXTS.jsonl [...] [--random]

Tokens of every document, of fuzzed texts and of each piece's own text; logits of float32 weights (`--type` of others) at
every position of some documents. `--random`: besides, the logits of a small random model of each architecture, with the
tokenizer of MODEL. Exit 1 when a token of a document or of a piece differs.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
import transformers

from cpt_jax.checkpoint.gguf_write import KINDS, export_gguf
from cpt_jax.core.precision import FLOAT32
from cpt_jax.recipe.export import text_logits
from cpt_jax.recipe.find import find_model
from cpt_jax.recipe.model import load_model
from cpt_jax.vocab.gate import fuzzed_texts
from cpt_jax.vocab.sentencepiece_model import SPACE
from cpt_jax.vocab.tokenizer import Tokenizer

MOST_TOKENS = 256
# Layers of every kind, texts beyond the windows.
SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e6}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
GEMMA = dict(sliding_window=24, query_pre_attn_scalar=16)
EXPERTS = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=True)
GRANITE = dict(embedding_multiplier=12.0, attention_multiplier=0.05, residual_multiplier=0.22, logits_scaling=3.0)
RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama 3.1": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True, max_position_embeddings=16384)),
    "llama, linear": ("Llama", dict(rope_parameters=LINEAR)),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2, yarn": ("Qwen2", dict(rope_parameters=YARN)),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {}),
    "gemma3": ("Gemma3Text", GEMMA | dict(rope_parameters={"sliding_attention": LOCAL, "full_attention": LINEAR})),
    "gemma2": ("Gemma2", GEMMA),
    "smollm3": ("SmolLM3", {}),
    "olmo2": ("Olmo2", dict(tie_word_embeddings=False)),
    "granite": ("Granite", GRANITE),
    "qwen3moe": ("Qwen3Moe", EXPERTS),
}


def random_model(name: str, tokenizer: Path, size: int, root: Path) -> Path:
    """A model directory; `size`: rows of the embedding."""
    kind, differences = RANDOM[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | {"vocab_size": size} | differences)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    center = 0.0 if name.startswith("gemma") else 1.0
    for path, weight in model.named_parameters():
        torch.nn.init.normal_(weight, center if "norm" in path else 0.0, 0.2)
    model.save_pretrained(root)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, root)
    return root


def opened(file: Path) -> llama_cpp.Llama:
    # Keys and values in float32 as here, not in float16.
    exact: dict[str, Any] = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "logits_all": True}
    return llama_cpp.Llama(str(file), n_ctx=MOST_TOKENS, n_batch=MOST_TOKENS, verbose=False, **exact)


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
    parser.add_argument("--random", action="store_true", help="also small random models of each architecture")
    arguments = parser.parse_args()
    directory = find_model(arguments.model)
    tokenizer, held = Tokenizer(directory), True
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "model.gguf"
        export_gguf(directory, file, arguments.type)
        print(f"{arguments.type}: {file.stat().st_size / 1e6:,.0f} MB")
        model, ids = opened(file), []
        for path in arguments.texts:
            texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
            held &= compare_tokens(model, tokenizer, str(path), texts)
            ids += [tokenizer.encode(text)[:MOST_TOKENS] for text in texts[: arguments.documents]]
        # Some differ with the base's tokenizer too.
        compare_tokens(model, tokenizer, "fuzzed", fuzzed_texts(2000))
        pieces = [tokenizer.piece_bytes(index).decode(errors="ignore") for index in range(tokenizer.size)]
        # Gemma's runs of spaces, which its added tokens are not named after.
        pieces = [piece.replace(SPACE, " ") for piece in pieces]
        held &= compare_tokens(model, tokenizer, "pieces", pieces)
        compare_logits(model, directory, ids)
        for name in RANDOM if arguments.random else ():
            small, file = random_model(name, directory, tokenizer.size, Path(root) / name), Path(root) / f"{name}.gguf"
            export_gguf(small, file, "f32")
            print(f"{name}: ", end="")
            compare_logits(opened(file), small, ids)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
