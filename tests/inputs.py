"""Small inputs that tests share: texts, a tokenizer, random weights."""

import json
import random
from pathlib import Path
from typing import Literal

import numpy as np

from cpt_jax.core.tree import flatten, unflatten
from cpt_jax.models.config import DecoderConfig, LayerKind
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.models.rope import Rope

ENGLISH = [
    "the",
    "city",
    "river",
    "was",
    "built",
    "old",
    "house",
    "people",
    "water",
    "year",
    "time",
    "state",
    "world",
    "school",
    "began",
    "history",
    "place",
    "under",
]
CHINESE = [
    "国务院",
    "有关部门",
    "应当",
    "依照",
    "本法",
    "规定",
    "违反",
    "处罚",
    "公民",
    "权利",
    "，",
    "。",
    "人民法院",
    "责任",
]
HF_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}


def compounds(documents: int, seed: int = 0) -> list[str]:
    """English words that hold the others: a new domain in the old one's letters."""
    generator = random.Random(seed)
    words = [first + second for first in ENGLISH for second in ENGLISH]
    return [" ".join(generator.choices(words, k=generator.randint(4, 30))) + "." for _ in range(documents)]


def english(documents: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(ENGLISH, k=generator.randint(4, 40))) + "." for _ in range(documents)]


def chinese(documents: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices(CHINESE, k=generator.randint(4, 30))) for _ in range(documents)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def write_tokenizer(
    directory: Path, texts: list[str], size: int = 320, kind: Literal["gpt2", "qwen", "llama3"] = "gpt2"
) -> None:
    """A byte-level BPE tokenizer, trained on a few texts, with its special tokens in front.

    As Qwen's and Llama 3's, it has them behind the vocabulary, with another added token and a chat template, and
    splits words and single digits by a pattern; Qwen's normalizes text, and in Llama 3's a word that is a piece is
    that piece, whatever the merges make of it.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    special, behind = ["<|endoftext|>", "<|im_end|>"], kind != "gpt2"
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if behind:
        pattern = tokenizers.Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 4 if behind else size,
        special_tokens=[] if behind else special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
    }
    if behind:
        tokenizer.add_special_tokens([*special, "<|im_start|>"])
        tokenizer.add_tokens(["<think>"])
        settings["chat_template"] = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_sentencepiece(directory: Path, texts: list[str], kind: str, size: int, **changes) -> None:
    """tokenizer.model as LLaMA's: byte fallback, single digits, a space put before a text.

    `kind`: "bpe" or "unigram"; `changes`: other settings of the `sentencepiece` trainer.
    """
    import sentencepiece

    settings = dict(
        character_coverage=1.0,
        byte_fallback=kind in ("bpe", "unigram"),
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            model_type=kind,
            vocab_size=size,
            **(settings | changes),
        )


def tiny_config(**changes) -> DecoderConfig:
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=320
    )
    sizes |= dict(max_position_embeddings=256) | changes
    kinds = (LayerKind(rope=Rope(theta=10_000.0, dim=sizes["head_dim"])),)
    return DecoderConfig(**(dict(layer_kinds=kinds) | sizes))


def hf_config(config: DecoderConfig) -> dict:
    return HF_LLAMA | {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.total_rows,
        "rope_theta": config.layer_kinds[0].rope.theta,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def random_weights(config: DecoderConfig, seed: int = 0, lora=None) -> dict:
    """Weights on the host, large enough that every part of the network matters."""
    generator = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        spread = 0.1 if path.endswith("/scale") else 0.3
        return (path.endswith("/scale") + generator.normal(0, spread, shape)).astype(np.float32)

    shapes = flatten(abstract_decoder(config, lora).shapes)
    return unflatten({path: draw(path, leaf.shape) for path, leaf in shapes.items()})
