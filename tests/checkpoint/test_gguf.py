"""GGUF files: transformers, gguf and sentencepiece say what is in them, and every file that is refused."""

import json
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from inputs import english, write_sentencepiece, write_tokenizer
from safetensors import safe_open
from safetensors.numpy import load_file
from sentencepiece import SentencePieceProcessor
from tokenizers import pre_tokenizers

from cpt_jax.checkpoint import gguf_weights
from cpt_jax.checkpoint.gguf import import_gguf
from cpt_jax.core.errors import UserError
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
}


def build(config) -> torch.nn.Module:
    """A model with random weights, large enough that every part of it matters."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.1)
    return model.eval()


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """As in llama.cpp's convert_hf_to_gguf.py."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(model) -> dict[str, np.ndarray]:
    """The weights under llama.cpp's names, by the table of the `gguf` package."""
    config = model.config
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.float().numpy()
        if architecture == "llama" and ".q_proj." in name:
            array = permute(array, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            array = permute(array, config.num_key_value_heads)
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = array
    if config.rope_parameters["rope_type"] == "llama3":
        scaled = model.model.rotary_emb.inv_freq.numpy()
        plain = config.rope_parameters["rope_theta"] ** (-np.arange(0, 2 * len(scaled), 2) / (2 * len(scaled)))
        tensors["rope_freqs.weight"] = (plain / scaled).astype(np.float32)
    return tensors


def hyperparameters(config) -> dict:
    """The key-value pairs that llama.cpp's converter writes for a model."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
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
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if getattr(config, "sliding_window", None):
        pairs["attention.sliding_window"] = config.sliding_window
    scaling = config.rope_parameters
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


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_an_imported_model_computes_what_the_original_did(tmp_path, config):
    original = build(config)
    import_gguf(write_model(tmp_path, config), tmp_path / "out")
    again = reload(tmp_path / "out")
    assert type(again) is type(original)
    expected = original.state_dict()
    ours = again.state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name].numpy(), err_msg=name)
    np.testing.assert_allclose(logits(again), logits(original), atol=1e-5)
    # All that decides what a model computes, as transformers reads it.
    kept = ("rope_parameters", "tie_word_embeddings", "sliding_window", "layer_types", "rms_norm_eps", *SIZES)
    for field in kept:
        assert getattr(again.config, field, None) == getattr(config, field, None), field


KINDS = [Kind[name] for name in ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32"]]


@pytest.mark.parametrize("model", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_weights_are_those_that_transformers_dequantises(tmp_path, kind, model):
    file = write_model(tmp_path, MODELS[model], kind)
    import_gguf(file, tmp_path / "out")
    reference = reload(tmp_path, gguf_file=file.name, dtype=torch.float32)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    expected = reference.state_dict()
    assert ours.keys() == expected.keys() - ({"lm_head.weight"} if MODELS[model].tie_word_embeddings else set())
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.astype(np.float32), expected[name].numpy(), err_msg=name)
    again = reload(tmp_path / "out", dtype=torch.float32)
    np.testing.assert_allclose(logits(again), logits(reference), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "norm", "dtype"),
    [
        (Kind.F16, 0.5, "float16"),
        (Kind.BF16, 0.5, "bfloat16"),
        (Kind.F16, 1 / 3, "float32"),
        (Kind.F16, 1e6, "float32"),
        (Kind.BF16, 1 / 3, "float32"),
        (Kind.Q8_0, 0.5, "float32"),
        (Kind.F32, 0.5, "float32"),
    ],
)
def test_a_half_precision_file_stays_one_where_nothing_is_lost(tmp_path, kind, norm, dtype):
    model = MODELS["llama, tied"]
    tensors = gguf_tensors(build(model))
    tensors = {
        name: (quantised(array, kind), kind) if array.ndim > 1 else np.full_like(array, norm)
        for name, array in tensors.items()
    }
    write_gguf(tmp_path / "model.gguf", hyperparameters(model) | placeholder_tokenizer(), tensors)
    import_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {array.dtype.name for array in weights.values()} == {dtype}
    np.testing.assert_array_equal(weights["model.norm.weight"].astype(np.float32), np.float32(norm))
    if dtype != "float32":
        for name, weight in build(model).state_dict().items():
            if weight.ndim > 1 and name in weights:
                expected = weight.to(getattr(torch, dtype)).view(torch.int16).numpy()
                np.testing.assert_array_equal(weights[name].view(np.int16), expected, err_msg=name)


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    file = write_model(tmp_path, MODELS["llama"], Kind.Q8_0)
    import_gguf(file, tmp_path / "whole")
    monkeypatch.setattr(gguf_weights, "SHARD_BYTES", 600_000)
    monkeypatch.setattr(gguf_weights, "CHUNK_VALUES", 5000)
    import_gguf(file, tmp_path / "shards")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 3
    whole, seen = load_file(tmp_path / "whole" / "model.safetensors"), {}
    for name in files:
        part = load_file(tmp_path / "shards" / name)
        assert sum(array.nbytes for array in part.values()) <= 600_000
        assert {index["weight_map"][key] for key in part} == {name}
        with safe_open(tmp_path / "shards" / name, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
        seen |= part
    assert seen.keys() == whole.keys() == index["weight_map"].keys()
    assert all(seen[name].tobytes() == array.tobytes() for name, array in whole.items())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    np.testing.assert_array_equal(logits(reload(tmp_path / "shards")), logits(reload(tmp_path / "whole")))


def test_memory_holds_a_piece_of_a_tensor_and_not_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_weights, "CHUNK_VALUES", 20_000)
    config = transformers.LlamaConfig(**SIZES | dict(intermediate_size=4096), **rope(1e4))
    file = write_model(tmp_path, config, Kind.Q4_0)
    import_gguf(file, tmp_path / "warm")
    tracemalloc.start()
    import_gguf(file, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 29 MB of weights, of which the largest tensor has 4.
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 25_000_000
    assert peak < 3_000_000


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


@pytest.mark.parametrize(
    ("pre", "written"),
    [("gpt-2", "gpt2"), ("smollm", "gpt2"), ("qwen2", "qwen"), ("llama-bpe", "qwen"), ("llama-bpe", "gpt2")],
)
def test_byte_level_tokens_are_those_of_transformers(tmp_path, pre, written):
    write_tokenizer(tmp_path / "tokenizer", TEXTS, 600, written)
    pairs = tokenizer_pairs(tmp_path / "tokenizer", pre)
    out = import_tokenizer(tmp_path, pairs)
    ours = transformers.AutoTokenizer.from_pretrained(out)
    written_file = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    if pre == "qwen2":
        document = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
        merges = [tuple(merge) for merge in document["model"]["merges"]]
        reference = transformers.Qwen2Tokenizer(vocab=document["model"]["vocab"], merges=merges)
        for token in document["added_tokens"]:
            entry = tokenizers.AddedToken(token["content"], normalized=False, special=token["special"])
            reference.add_tokens([entry], special_tokens=token["special"])
    else:
        reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False)])
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text, add_special_tokens=False), text
        # transformers may build the tokenizer of a known model anew: tokenizer.json has to say the same.
        assert ids == written_file.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids) == (text if pre != "qwen2" else ours.backend_tokenizer.normalizer.normalize_str(text))
    size = len(pairs["tokenizer.ggml.tokens"])
    assert len(ours) == size - 2, "fillers are no tokens"
    assert ours.convert_ids_to_tokens(list(range(size - 2))) == pairs["tokenizer.ggml.tokens"][:-2]
    assert (ours.bos_token, ours.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert ours.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<|im_start|>Hi<|im_end|>"


def test_a_word_that_is_a_piece_is_that_piece_in_llama_3(tmp_path):
    write_tokenizer(tmp_path / "tokenizer", TEXTS, 600)
    pairs = tokenizer_pairs(tmp_path / "tokenizer", "llama-bpe")
    pieces = pairs["tokenizer.ggml.tokens"]
    pieces[pieces.index(f"[PAD{len(pieces) - 2}]")] = "Ġzqzq"
    pairs["tokenizer.ggml.token_type"][len(pieces) - 2] = 1
    ours = transformers.AutoTokenizer.from_pretrained(import_tokenizer(tmp_path, pairs))
    assert ours.encode(" zqzq", add_special_tokens=False) == [len(pieces) - 2]


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "sentencepiece"])
@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, False, None])
def test_bos_and_eos_are_added_as_the_file_says(tmp_path, pre, bos, eos):
    if pre == "sentencepiece":
        write_sentencepiece(tmp_path / "tokenizer", english(200), "bpe", 400)
        pairs = sentencepiece_pairs(tmp_path / "tokenizer")
    else:
        write_tokenizer(tmp_path / "tokenizer", english(50), 300)
        pairs = tokenizer_pairs(tmp_path / "tokenizer", pre)
    # How some converters write that there is no such token.
    pairs["tokenizer.ggml.padding_token_id"] = 2**32 - 1
    pairs |= {} if bos is None else {"tokenizer.ggml.add_bos_token": bos}
    pairs |= {} if eos is None else {"tokenizer.ggml.add_eos_token": eos}
    ours = transformers.AutoTokenizer.from_pretrained(import_tokenizer(tmp_path, pairs))
    bos = pre != "gpt-2" if bos is None else bos
    plain = ours.encode("the city", add_special_tokens=False)
    assert ours.encode("the city") == [ours.bos_token_id] * bos + plain + [ours.eos_token_id] * bool(eos)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["add_bos_token"], settings["add_eos_token"]) == (bos, bool(eos))
    assert "pad_token" not in settings


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


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("digits", [True, False])
def test_a_sentencepiece_tokenizer_comes_back(tmp_path, prefix, digits):
    texts = [*TEXTS[:-1], *english(200), "2024 2024 2024 1999 1999 12 12 12"] * 2
    write_sentencepiece(tmp_path / "tokenizer", texts, "bpe", 700, add_dummy_prefix=prefix, split_digits=digits)
    pairs = sentencepiece_pairs(tmp_path / "tokenizer") | {"tokenizer.ggml.add_space_prefix": prefix}
    out = import_tokenizer(tmp_path, pairs)
    before, after = (read_model(path / "tokenizer.model") for path in (tmp_path / "tokenizer", out))
    for piece, expected in zip(after.pieces[:-1], before.pieces, strict=True):
        assert (piece.piece, piece.score, piece.type) == (expected.piece, expected.score, expected.type)
    assert after.pieces[-1].piece == "<|im_end|>"
    for field in ("model_type", "byte_fallback", "split_digits", "bos_id", "eos_id", "unk_id", "pad_id"):
        assert getattr(after.trainer_spec, field) == getattr(before.trainer_spec, field), field
    original = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer" / "tokenizer.model"))
    written = SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    fast = transformers.AutoTokenizer.from_pretrained(out)
    for text in TEXTS[:-1]:
        assert written.encode(text) == original.encode(text)
        assert fast.encode(text, add_special_tokens=False) == original.encode(text), text
    assert fast.encode("a<|im_end|>", add_special_tokens=False)[-1] == len(before.pieces)
    assert (fast.bos_token, fast.eos_token, fast.unk_token) == ("<s>", "</s>", "<unk>")


def spoiled(changes: dict | None = None, drop: str | None = None, add: dict | None = None) -> tuple[dict, dict]:
    """Pairs and tensors of a small Llama with something wrong in them."""
    model = MODELS["llama, tied"]
    pairs = hyperparameters(model) | placeholder_tokenizer() | (changes or {})
    tensors = gguf_tensors(build(model)) | (add or {})
    return {k: v for k, v in pairs.items() if k != drop}, {k: v for k, v in tensors.items() if k != drop}


REFUSED = {
    "architecture": (dict(changes={"general.architecture": "mamba"}), "architecture 'mamba'.*supported: llama, qwen2"),
    "experts": (dict(changes={"llama.expert_count": 8}), "mixture of 8 experts"),
    "unknown tensor": (dict(add={"blk.0.attn_q.bias": np.zeros(256, np.float32)}), "tensor 'blk.0.attn_q.bias'.*use"),
    "missing tensor": (dict(drop="blk.1.ffn_up.weight"), "lacks 1 tensors, 'blk.1.ffn_up.weight' first"),
    "missing field": (dict(drop="llama.block_count"), "lacks 'llama.block_count'"),
    "fewer tokens": (
        dict(changes=placeholder_tokenizer(300)),
        r"token_embd.weight has shape \[320, 256\].*\[300, 256\]",
    ),
    "uneven layers": (dict(changes={"llama.attention.head_count": [4, 2]}), "head_count' differs from layer to layer"),
    "rope_freqs": (dict(add={"rope_freqs.weight": np.full(32, 3, np.float32)}), r"rope_freqs.weight \(3 to 3\)"),
    "longrope": (dict(changes={"llama.rope.scaling.type": "longrope"}), "RoPE by 'longrope'.*supported: linear, yarn"),
    "yarn's factor": (
        dict(changes={"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_attn_factor": 2.0}),
        "RoPE by 'yarn_attn_factor'",
    ),
    "partial rotation": (
        dict(changes={"llama.rope.dimension_count": 16, "llama.attention.key_length": 64}),
        "rotates 16",
    ),
    "split": (dict(changes={"split.count": 3}), "one of 3 parts.*llama-gguf-split --merge"),
    "pre-tokenizer": (
        dict(changes={"tokenizer.ggml.pre": "tekken"}),
        "pre-tokenizer 'tekken'; supported: smollm, gpt-2",
    ),
    "no pre-tokenizer": (dict(drop="tokenizer.ggml.pre"), "pre-tokenizer None; supported"),
    "tokenizer": (dict(changes={"tokenizer.ggml.model": "t5"}), "tokenizer of kind 't5'; supported"),
    "quantisation": (
        dict(add={"output.weight": (np.zeros((320, 320), np.uint8), Kind.Q8_1)}),
        "output.weight is quantised as Q8_1.*use a Q4_K_M",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_files_are_refused_by_name(tmp_path, wrong, message):
    write_gguf(tmp_path / "model.gguf", *spoiled(**wrong))
    with pytest.raises(UserError, match=message) as error:
        import_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"], "a directory appears whole or not at all"


@pytest.mark.parametrize(("kind", "last"), [(1, None), (2, "▁the")], ids=["no unknown token", "a piece twice"])
def test_sentencepiece_pieces_that_cannot_be_are_refused(tmp_path, kind, last):
    write_sentencepiece(tmp_path / "tokenizer", english(200), "bpe", 400)
    pairs = sentencepiece_pairs(tmp_path / "tokenizer")
    pairs["tokenizer.ggml.token_type"][0] = kind
    pairs["tokenizer.ggml.tokens"][-4] = last or pairs["tokenizer.ggml.tokens"][-4]
    with pytest.raises(UserError, match="no SentencePiece vocabulary"):
        import_tokenizer(tmp_path, pairs)


def test_a_file_that_was_cut_anywhere_is_refused(tmp_path):
    pairs, tensors = spoiled()
    whole = write_gguf(tmp_path / "model.gguf", pairs, tensors).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 2000, 37), *np.linspace(2000, len(whole) - 64, 40).astype(int)]:
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"no whole GGUF file.*fetch it again"):
            import_gguf(cut, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantisation_of_a_newer_gguf_is_told(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", *spoiled())
    content, name = file.read_bytes(), b"output_norm.weight"
    # Behind a tensor's name: its number of axes, their sizes, and then its kind.
    place = content.index(name) + len(name) + 4 + 8
    file.write_bytes(content[:place] + (999).to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(UserError, match=r"999.*upgrade it"):
        import_gguf(file, tmp_path / "out")


@pytest.mark.parametrize("content", [b"GGUF but not really", b"", b"PK\x03\x04 something else entirely"])
def test_files_that_are_no_gguf_are_refused(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UserError, match="no whole GGUF file"):
        import_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_gguf_import_is_that_of_transformers(smollm2):
    """Every tensor of the real SmolLM2 as transformers dequantises it, and its own tokenizer's ids."""
    gguf = Path(".cache/quickstart").absolute()
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        gguf, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
    )
    expected = reference.state_dict()
    ours = load_file(smollm2 / "model.safetensors")
    assert ours.keys() == expected.keys() - {"lm_head.weight"}
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, expected[name].numpy(), err_msg=name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("In 2024, 中") == ["In", "Ġ", "2", "0", "2", "4", ",", "Ġ", "ä¸Ń"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
