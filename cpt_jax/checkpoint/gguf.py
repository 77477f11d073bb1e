"""A GGUF file as a Hugging Face model directory: dequantised, without torch.

Follows the GGUF specification (ggml-org/ggml, docs/gguf.md); the `gguf` package reads and dequantises. Llama
architecture, byte-level BPE.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import atomic_directory, write_json_atomic, write_text_atomic

# llama.cpp's tensor names within a block -> Hugging Face's.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

# How a pre-tokenizer of llama.cpp's ("tokenizer.ggml.pre") reads in the `tokenizers` library.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS: dict[str, dict] = {
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
    "gpt-2": _BYTE_LEVEL,
}
_CONTROL, _USER_DEFINED = 3, 4


def import_gguf(file: Path, out: Path) -> None:
    """Writes `out/` with config.json, model.safetensors (float32), the tokenizer's files and generation_config.json.

    Raises:
      UserError: no GGUF file, another architecture or tokenizer than supported, or a full disk.
    """
    from gguf import GGUFReader

    file = Path(file)
    if not file.exists():
        raise UserError(f"{file} does not exist")
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{file} is no whole GGUF file ({error}): fetch it again") from error

    def field(name: str, default: Any = None) -> Any:
        found = reader.get_field(name)
        return default if found is None else found.contents()

    if (architecture := field("general.architecture")) != "llama":
        raise UserError(f"{file} is of architecture {architecture!r}; supported: llama")
    config = _config(field)
    with atomic_directory(Path(out)) as directory:
        _write_weights(reader, config, directory / "model.safetensors")
        write_json_atomic(directory / "config.json", config)
        _write_tokenizer(field, file, directory)
        write_json_atomic(
            directory / "generation_config.json",
            {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        )


def _config(field: Callable) -> dict:
    heads, width = field("llama.attention.head_count"), field("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv", heads),
        "head_dim": field("llama.attention.key_length", width // heads),
        "max_position_embeddings": field("llama.context_length"),
        # The file holds a float32; the six digits are what was meant.
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(field("llama.rope.freq_base", 10_000.0)),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": len(field("tokenizer.ggml.tokens")),
        "tie_word_embeddings": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of Q and K rows [heads * head_dim, D], which rotates neighbouring pairs instead
    of halves."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _write_weights(reader: Any, config: dict, path: Path) -> None:
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    weights = {}
    for tensor in reader.tensors:
        parts = tensor.name.removesuffix(".weight").split(".")
        if parts[0] == "rope_freqs":
            raise UserError("the GGUF file scales RoPE (rope_freqs), which is not supported yet")
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if parts[0] == "blk" and parts[-1] in BLOCK_NAMES:
            if parts[-1] == "attn_q":
                array = unpermute(array, config["num_attention_heads"])
            elif parts[-1] == "attn_k":
                array = unpermute(array, config["num_key_value_heads"])
            name = f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[-1]]}.weight"
        elif parts[0] in OUTER_NAMES:
            name = f"{OUTER_NAMES[parts[0]]}.weight"
        else:
            raise UserError(f"the GGUF file holds a tensor {tensor.name!r} that a Llama model does not have")
        weights[name] = np.ascontiguousarray(array)
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    save_file(weights, path, metadata={"format": "pt"})


def _write_tokenizer(field: Callable, file: Path, directory: Path) -> None:
    kind, pre = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{file} has a tokenizer of kind {kind!r} with pre-tokenizer {pre!r}; supported: byte-level BPE ('gpt2') with "
            f"{', '.join(PRE_TOKENIZERS)}. Use the model's Hugging Face directory instead"
        )
    pieces, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    added = [
        {"id": index, "content": piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": types[index] == _CONTROL}
        for index, piece in enumerate(pieces)
        if types[index] in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": _BYTE_LEVEL | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": [merge.split(" ") for merge in field("tokenizer.ggml.merges")],
        },
    }
    write_text_atomic(directory / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False, indent=2))
    named = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    settings: dict[str, Any] = {
        key: pieces[index] for key, name in named.items() if (index := field(f"tokenizer.ggml.{name}")) is not None
    }
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": field("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    if (template := field("tokenizer.chat_template")) is not None:
        settings["chat_template"] = template
    write_json_atomic(directory / "tokenizer_config.json", settings)
