"""Small GGUF files of tiny models, written for tests."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from inputs import english
from tokenizers import pre_tokenizers

from cpt_jax.checkpoint.gguf import import_gguf
from cpt_jax.vocab.sentencepiece_model import read_model

VOCABULARY = 320
# K quantisations have blocks of 256 values.
SIZES = dict(
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    bos_token_id=0,
    eos_token_id=0,
)
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LAYERS = dict(head_dim=64, num_hidden_layers=7)
GEMMA = dict(query_pre_attn_scalar=64, sliding_window=7)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0}


def rope(theta: float, **scaling) -> dict:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default"} | scaling}


MODELS = {
    "llama": transformers.LlamaConfig(**SIZES, **rope(10_000.0)),
    "llama, tied": transformers.LlamaConfig(**SIZES, **rope(1e5), tie_word_embeddings=True),
    "llama, wide heads": transformers.LlamaConfig(**SIZES, **rope(1e4), head_dim=128),
    "llama, linear": transformers.LlamaConfig(**SIZES, **rope(1e4, rope_type="linear", factor=2.5)),
    "llama 3.1": transformers.LlamaConfig(**SIZES, **rope(5e5, **LLAMA3, factor=8.0)),
    "llama 3.2": transformers.LlamaConfig(**SIZES, **rope(5e5, **LLAMA3, factor=32.0), tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SIZES, **rope(1e6), head_dim=64, sliding_window=7),
    "qwen2": transformers.Qwen2Config(**SIZES, **rope(1e6)),
    "qwen2, yarn": transformers.Qwen2Config(**SIZES, **rope(1e6, **YARN)),
    "qwen2, window": transformers.Qwen2Config(
        **SIZES, **rope(1e6), use_sliding_window=True, sliding_window=7, max_window_layers=0
    ),
    # transformers' own loader takes 128 for Qwen3's head_dim, whatever the file says.
    "qwen3": transformers.Qwen3Config(**SIZES, **rope(1e6), head_dim=128, tie_word_embeddings=True),
    "qwen3, narrow heads": transformers.Qwen3Config(**SIZES, **rope(1e6), head_dim=32),
    "qwen3moe": transformers.Qwen3MoeConfig(
        **SIZES,
        **rope(1e6),
        head_dim=128,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=512,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
    ),
    "gemma": transformers.GemmaConfig(**SIZES | LAYERS, **rope(1e4)),
    "gemma2": transformers.Gemma2Config(**SIZES | LAYERS, **GEMMA, **rope(1e4), attn_logit_softcapping=40.0),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES | LAYERS,
        **GEMMA,
        final_logit_softcapping=20.0,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    ),
    "gemma3, other layers": transformers.Gemma3TextConfig(
        **SIZES | LAYERS,
        **GEMMA,
        tie_word_embeddings=False,
        layer_types=["full_attention", "sliding_attention"] * 3 + ["full_attention"],
    ),
    "smollm3": transformers.SmolLM3Config(**SIZES | LAYERS, **rope(5e4), pad_token_id=None),
    "olmo2": transformers.Olmo2Config(**SIZES, **rope(5e5), pad_token_id=None),
    "granite": transformers.GraniteConfig(
        **SIZES,
        **rope(1e4),
        embedding_multiplier=12,
        attention_multiplier=128**-0.5,
        residual_multiplier=0.22,
        logits_scaling=3.0,
    ),
}
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}
PERMUTED = ("llama", "smollm3", "granite")


def build(config) -> torch.nn.Module:
    """A model with random weights, large enough that every part of it matters."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, weight in model.named_parameters():
        # Gemma's norms are 1 + weight.
        center = 1.0 if "norm" in name and not config.model_type.startswith("gemma") else 0.0
        torch.nn.init.normal_(weight, center, 0.1)
        if center == 0.0 and "norm" in name:
            # What adding 1 in float32 loses nothing of, as of bfloat16.
            weight.data = torch.round(weight.data * 1024) / 1024 + 0.0
    return model.eval()


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """As in llama.cpp's convert_hf_to_gguf.py."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(model) -> dict[str, np.ndarray]:
    """The weights under llama.cpp's names, by the table of the `gguf` package."""
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.float().numpy()
        if architecture in PERMUTED and ".q_proj." in name:
            array = permute(array, config.num_attention_heads)
        if architecture in PERMUTED and ".k_proj." in name:
            array = permute(array, config.num_key_value_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + np.float32(1)
        parts = {name: array}
        if name.endswith("gate_up_proj"):
            halves = zip(("gate_proj", "up_proj"), np.split(array, 2, axis=1), strict=True)
            parts = {name.replace("gate_up_proj", half): part for half, part in halves}
        for part, values in parts.items():
            found = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert found is not None, part
            # Stacks of experts have no suffix.
            tensors[found if found.endswith((".weight", ".bias")) else f"{found}.weight"] = values
    if config.rope_parameters.get("rope_type") == "llama3":
        scaled = model.model.rotary_emb.inv_freq.numpy()
        plain = config.rope_parameters["rope_theta"] ** (-np.arange(0, 2 * len(scaled), 2) / (2 * len(scaled)))
        tensors["rope_freqs.weight"] = (plain / scaled).astype(np.float32)
    return tensors


def hyperparameters(config) -> dict:
    """The key-value pairs that llama.cpp's converter writes for a model."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    scaling = config.rope_parameters.get("full_attention", config.rope_parameters)
    pairs = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(scaling["rope_theta"]),
    }
    if getattr(config, "sliding_window", None):
        pairs["attention.sliding_window"] = config.sliding_window
    if architecture == "gemma3":
        pairs["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
        if config.layer_types[0] == "full_attention":
            pairs["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            pairs[name] = float(getattr(config, name))
    if architecture == "granite":
        pairs |= {
            "attention.scale": config.attention_multiplier,
            "embedding_scale": float(config.embedding_multiplier),
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    if architecture == "qwen3moe":
        pairs |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    if scaling["rope_type"] in ("linear", "yarn"):
        pairs |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": scaling["factor"]}
    if scaling["rope_type"] == "yarn":
        pairs["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
        pairs["rope.scaling.yarn_beta_fast"] = scaling["beta_fast"]
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in pairs.items()}


def placeholder_tokenizer(size: int = VOCABULARY) -> dict:
    """A byte-level vocabulary for tests of weights."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<|endoftext|>", *letters, *(a + b for a in letters[:10] for b in letters[:10])][:size]
    merges = [" ".join(piece) for piece in pieces if len(piece) == 2]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [3] + [1] * (size - 1),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }


def write_gguf(path: Path, pairs: dict, tensors: dict[str, np.ndarray | tuple[np.ndarray, Kind]]) -> Path:
    """A GGUF file, by the `gguf` package's writer; a tensor without a kind is float32."""
    writer = gguf.GGUFWriter(path, pairs["general.architecture"])
    for key, value in pairs.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, Kind.F32)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(directory: Path, config, kind: Kind = Kind.F32) -> Path:
    """model.gguf of a random model, its matrices quantised and its vectors float32, as llama.cpp has them."""
    directory.mkdir(exist_ok=True)
    tensors = {
        name: (quantised(array, kind), kind) if array.ndim > 1 else array
        for name, array in gguf_tensors(build(config)).items()
    }
    return write_gguf(directory / "model.gguf", hyperparameters(config) | placeholder_tokenizer(), tensors)


def quantised(array: np.ndarray, kind: Kind) -> np.ndarray:
    """Blocks of the kind; for the K kinds, which `gguf` cannot quantise, random ones with small scales."""
    if kind.name not in ("Q4_K", "Q5_K", "Q6_K"):
        return gguf.quants.quantize(array, kind)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(array.size)
    blocks = generator.integers(0, 256, (array.size // values, size), np.uint8)
    scales = generator.uniform(1e-4, 1e-3, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    if kind == Kind.Q6_K:
        blocks[:, -2:] = scales[:, :2]
    else:
        blocks[:, :4] = scales
    return blocks.reshape(array.shape[0], -1)


def logits(model) -> np.ndarray:
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (2, 40)))
    with torch.no_grad():
        return model(ids).logits.float().numpy()


def reload(directory: Path, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", **settings).eval()


TEXTS = [
    *english(20),
    "It's WE'LL they've I'M don'T 12345 6 ２３ ٣٤",
    "a  b   c\n\n  d\t\te \r\n f\n",
    "   leading, trailing   ",
    "x=1;y+=22//3;\n\n\n    return [a.b(c)]!!!\n",
    "cafe\u0301 caf\u00e9 \ufb01 \u212b \u1e9b\u0323 \uac00 \u1100\u1161",
    "国务院有关部门应当依照本法规定。\u3000违反",
    "नमस्ते दुनिया สวัสดี مرحبا 👩‍👩‍👧 🏳️‍🌈 \u00a0\u2003x",
    "<|endoftext|>text<|im_end|>\n<think>t</think>",
]


def tokenizer_pairs(directory: Path, pre: str) -> dict:
    """The key-value pairs of a byte-level tokenizer.json, as llama.cpp's converter writes them, with two fillers."""
    document = json.loads((directory / "tokenizer.json").read_text())
    added = {token["id"]: token for token in document["added_tokens"]}
    pieces = {index: piece for piece, index in document["model"]["vocab"].items()}
    pieces |= {index: token["content"] for index, token in added.items()}
    size = max(pieces) + 3
    types = [5 if i not in pieces else 1 if i not in added else 3 if added[i]["special"] else 4 for i in range(size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [pieces.get(index, f"[PAD{index}]") for index in range(size)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in document["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": next(i for i, token in added.items() if token["content"] == "<|endoftext|>"),
        "tokenizer.ggml.eos_token_id": next(i for i, token in added.items() if token["content"] == "<|im_end|>"),
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    }


def import_tokenizer(directory: Path, pairs: dict) -> Path:
    """A file with a tokenizer and a model of no more than it needs, imported."""
    size = len(pairs["tokenizer.ggml.tokens"])
    kind = transformers.Qwen2Config if pairs["tokenizer.ggml.pre"] == "qwen2" else transformers.LlamaConfig
    config = kind(**SIZES | dict(vocab_size=size, num_hidden_layers=1), **rope(1e4))
    tensors = gguf_tensors(build(config))
    file = write_gguf(directory / "model.gguf", hyperparameters(config) | pairs, tensors)
    import_gguf(file, directory / "out")
    return directory / "out"


def sentencepiece_pairs(directory: Path) -> dict:
    """The key-value pairs of a tokenizer.model, as llama.cpp's converter writes them, with an added token and two
    fillers."""
    proto = read_model(directory / "tokenizer.model")
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    pieces.append(("<|im_end|>", -1000.0, 4))
    pieces += [(f"[PAD{len(pieces) + i}]", -10_000.0, 5) for i in range(2)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece for piece, _, _ in pieces],
        "tokenizer.ggml.scores": [score for _, score, _ in pieces],
        "tokenizer.ggml.token_type": [int(kind) for _, _, kind in pieces],
    }
