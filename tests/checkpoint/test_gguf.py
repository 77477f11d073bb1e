"""GGUF files: what transformers reads from them, and every way in which one can be wrong."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf_files import (
    MODELS,
    SIZES,
    build,
    gguf_tensors,
    hyperparameters,
    import_tokenizer,
    logits,
    placeholder_tokenizer,
    quantised,
    reload,
    rope,
    sentencepiece_pairs,
    write_gguf,
    write_model,
)
from inputs import english, write_sentencepiece
from safetensors import safe_open
from safetensors.numpy import load_file

from cpt_jax.checkpoint import gguf as gguf_reading
from cpt_jax.checkpoint import gguf_weights
from cpt_jax.checkpoint.base import resolve_base
from cpt_jax.checkpoint.gguf import Metadata, import_gguf, model_config
from cpt_jax.core.errors import UserError


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


@pytest.mark.parametrize("turn", [None, 5, 10**6])
def test_what_ends_a_turn_ends_what_is_generated(tmp_path, turn):
    model = MODELS["llama"]
    given = {} if turn is None else {"tokenizer.ggml.eot_token_id": turn}
    pairs = hyperparameters(model) | placeholder_tokenizer() | given
    write_gguf(tmp_path / "model.gguf", pairs, gguf_tensors(build(model)))
    import_gguf(tmp_path / "model.gguf", tmp_path / "out")
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    end = json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"]
    assert generation["eos_token_id"] == ([end, 5] if turn == 5 else end)


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
    monkeypatch.setattr(gguf_reading, "SHARD_BYTES", 600_000)
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


def spoiled(changes: dict | None = None, drop: str | None = None, add: dict | None = None) -> tuple[dict, dict]:
    """Pairs and tensors of a small Llama with something wrong in them."""
    model = MODELS["llama, tied"]
    pairs = hyperparameters(model) | placeholder_tokenizer() | (changes or {})
    tensors = gguf_tensors(build(model)) | (add or {})
    return {k: v for k, v in pairs.items() if k != drop}, {k: v for k, v in tensors.items() if k != drop}


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_of_gemma_what_llama_cpp_knows_without_the_file(name, layers):
    pairs = Metadata(hyperparameters(MODELS[name]) | placeholder_tokenizer())
    assert model_config(pairs, {})["query_pre_attn_scalar"] == 64
    # The models of 27B: hidden_size over the heads.
    pairs |= {f"{name}.block_count": layers, f"{name}.attention.key_length": 32, f"{name}.rope.dimension_count": 32}
    assert model_config(pairs, {})["query_pre_attn_scalar"] == 256 // 4
    assert model_config(Metadata(pairs | {f"{name}.block_count": 3}), {})["query_pre_attn_scalar"] == 32
    del pairs[f"{name}.attention.sliding_window"]
    read = model_config(pairs, {})
    assert read.get("sliding_window") == (4096 if name == "gemma2" else None)
    assert ("sliding_attention" in read["layer_types"]) == (name == "gemma2")


OLMO3 = {name.partition(".")[2]: value for name, value in hyperparameters(MODELS["olmo2"]).items()}
OLMO3 |= {"attention.sliding_window": 8}
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
    "a window": (
        dict(changes={"general.architecture": "olmo2"} | {f"olmo2.{n}": v for n, v in OLMO3.items()}),
        "window of 8.*olmo2",
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


def test_for_a_tokenizer_no_weights_are_written(tmp_path):
    file, cache = str(write_model(tmp_path, MODELS["llama"], Kind.Q8_0)), tmp_path / "cache"
    alone = resolve_base(file, cache, weights=False)
    assert not list(alone.glob("*.safetensors"))
    whole = resolve_base(file, cache)
    assert (whole / "model.safetensors").exists()
    assert (alone / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    # What is there with its weights serves as well.
    assert resolve_base(file, cache, weights=False) == whole


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
