"""A model written as GGUF: what llama.cpp's own converter would have written, and what transformers reads of it."""

import copy
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf_files import (
    LLAMA3,
    MODELS,
    SIZES,
    TEXTS,
    build,
    gguf_tensors,
    hyperparameters,
    import_tokenizer,
    logits,
    quantised,
    reload,
    rope,
    sentencepiece_pairs,
    tokenizer_pairs,
)
from inputs import chinese, english, write_jsonl, write_sentencepiece, write_tokenizer
from safetensors.numpy import load_file, save_file

from cpt_jax.checkpoint.gguf import import_gguf, read_gguf
from cpt_jax.checkpoint.gguf_write import KINDS, export_gguf
from cpt_jax.cli import main
from cpt_jax.cli.parser import GGUF_KINDS
from cpt_jax.core.errors import UserError
from cpt_jax.vocab.tokenizer import Tokenizer


def directory_of(root: Path, config, tokenizer: Path | None = None, **settings) -> Path:
    """A random model as transformers saves it, with a tokenizer."""
    # A copy: its dtype is changed.
    build(copy.deepcopy(config)).to(**settings).save_pretrained(root)
    if tokenizer is None:
        write_tokenizer(root, english(50), 310)
    else:
        shutil.copytree(tokenizer, root, dirs_exist_ok=True)
    return root


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_what_is_written_is_what_llama_cpp_s_converter_writes(tmp_path, config):
    out = tmp_path / "model.gguf"
    export_gguf(directory_of(tmp_path / "model", config), out)
    metadata, tensors = read_gguf(out)
    expected = hyperparameters(config)
    for name, value in expected.items():
        assert metadata[name] == (np.float32(value) if isinstance(value, float) else value), name
        assert type(metadata[name]) is type(value), name
    wanted = gguf_tensors(build(config))
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert tensor.tensor_type == Kind.F32
        if name == "rope_freqs.weight":
            np.testing.assert_allclose(tensor.data, wanted[name], rtol=1e-6)
        else:
            np.testing.assert_array_equal(tensor.data, wanted[name], err_msg=name)


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "gemma", "gemma2", "gemma3", "smollm3", "olmo2", "granite", "qwen3moe"]
)
def test_what_is_written_is_read_again(tmp_path, name):
    directory = directory_of(tmp_path / "model", MODELS[name])
    export_gguf(directory, tmp_path / "model.gguf")
    import_gguf(tmp_path / "model.gguf", tmp_path / "again")
    before, after = (load_file(each / "model.safetensors") for each in (directory, tmp_path / "again"))
    assert before.keys() == after.keys()
    for tensor, values in before.items():
        np.testing.assert_array_equal(after[tensor], values, err_msg=tensor)
    np.testing.assert_allclose(logits(reload(tmp_path / "again")), logits(build(MODELS[name])), atol=1e-5)


def test_experts_in_stacks_are_written_as_those_in_files_of_their_own(tmp_path):
    directory = directory_of(tmp_path / "model", MODELS["qwen3moe"])
    export_gguf(directory, tmp_path / "model.gguf")
    stacked = build(MODELS["qwen3moe"]).state_dict()
    assert "model.layers.0.mlp.experts.gate_up_proj" in stacked
    save_file({name: tensor.numpy() for name, tensor in stacked.items()}, directory / "model.safetensors")
    export_gguf(directory, tmp_path / "stacked.gguf")
    (_, one), (_, other) = (read_gguf(tmp_path / name) for name in ("model.gguf", "stacked.gguf"))
    for name, tensor in one.items():
        np.testing.assert_array_equal(other[name].data, tensor.data, err_msg=name)


def test_experts_are_quantised_row_by_row(tmp_path):
    directory = directory_of(tmp_path / "model", MODELS["qwen3moe"])
    export_gguf(directory, tmp_path / "model.gguf", "q8_0")
    assert read_gguf(tmp_path / "model.gguf")[1]["blk.0.ffn_down_exps.weight"].tensor_type == Kind.Q8_0
    import_gguf(tmp_path / "model.gguf", tmp_path / "again")
    before, after = (load_file(each / "model.safetensors") for each in (directory, tmp_path / "again"))
    for name, values in before.items():
        if "experts" in name:
            expected = gguf.quants.dequantize(quantised(values, Kind.Q8_0), Kind.Q8_0)
            np.testing.assert_array_equal(after[name], expected, err_msg=name)


def test_of_a_model_that_sees_the_text_model_is_written(tmp_path):
    text = MODELS["gemma3"]
    vision = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    # transformers' composite model does not cap logits.
    plain = text.to_dict() | {"final_logit_softcapping": None}
    config = transformers.Gemma3Config(text_config=plain, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 0.0, 0.1)
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model", english(50), 310)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    import_gguf(tmp_path / "model.gguf", tmp_path / "again")
    np.testing.assert_allclose(logits(reload(tmp_path / "again")), logits(model.eval()), atol=1e-4)


@pytest.mark.parametrize("name", ["llama, tied", "llama 3.2", "qwen2", "qwen3"])
def test_transformers_computes_the_same_of_it(tmp_path, name):
    directory = directory_of(tmp_path / "model", MODELS[name])
    export_gguf(directory, tmp_path / "model.gguf")
    # transformers reads no scaling of RoPE from a GGUF file.
    settings = {"config": MODELS[name]} if name == "llama 3.2" else {}
    again = reload(tmp_path, gguf_file="model.gguf", dtype=torch.float32, **settings)
    np.testing.assert_allclose(logits(again), logits(build(MODELS[name])), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_of_the_kind_that_is_wanted_and_vectors_float32(tmp_path, kind):
    config = transformers.LlamaConfig(**SIZES | {"intermediate_size": 272}, **rope(1e4))
    out = tmp_path / "model.gguf"
    export_gguf(directory_of(tmp_path / "model", config), out, kind)
    metadata, tensors = read_gguf(out)
    for name, array in gguf_tensors(build(config)).items():
        # Rows of 272 values are no whole blocks of 32.
        wanted = "F32" if array.ndim == 1 else "F16" if kind == "q8_0" and array.shape[-1] % 32 else kind.upper()
        assert tensors[name].tensor_type.name == wanted, name
        np.testing.assert_array_equal(
            np.asarray(tensors[name].data).view(np.uint8), quantised(array, Kind[wanted]).view(np.uint8), err_msg=name
        )
    assert (
        gguf.LlamaFileType(metadata["general.file_type"]).name
        == {
            "f32": "ALL_F32",
            "f16": "MOSTLY_F16",
            "bf16": "MOSTLY_BF16",
            "q8_0": "MOSTLY_Q8_0",
        }[kind]
    )
    assert kind != "q8_0" or {each.tensor_type.name for each in tensors.values()} == {"F32", "F16", "Q8_0"}


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3moe"])
@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_weights_stay_as_the_files_have_them(tmp_path, dtype, kind, name):
    directory = directory_of(tmp_path / "model", MODELS[name], dtype=dtype)
    export_gguf(directory, tmp_path / "model.gguf")
    assert {each.tensor_type.name for each in read_gguf(tmp_path / "model.gguf")[1].values()} == {kind, "F32"}
    import_gguf(tmp_path / "model.gguf", tmp_path / "again")
    before, after = (load_file(each / "model.safetensors") for each in (directory, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name].view(np.uint16), tensor.view(np.uint16), err_msg=name)


@pytest.mark.parametrize(
    ("pre", "written"),
    [("gpt-2", "gpt2"), ("smollm", "gpt2"), ("qwen2", "qwen"), ("llama-bpe", "gpt2"), ("dbrx", "gpt2")],
)
def test_a_byte_level_tokenizer_is_told_as_it_was_read(tmp_path, pre, written):
    write_tokenizer(tmp_path / "tokenizer", TEXTS, 600, written)
    pairs = tokenizer_pairs(tmp_path / "tokenizer", pre)
    # Begins with the beginning of text, as Llama 3's does.
    pairs["tokenizer.ggml.add_bos_token"] = pre == "llama-bpe"
    export_gguf(import_tokenizer(tmp_path, pairs), tmp_path / "again.gguf")
    metadata, _ = read_gguf(tmp_path / "again.gguf")
    assert {name: metadata[name] for name in pairs} == pairs


def test_a_sentencepiece_tokenizer_is_told_as_it_was_read(tmp_path):
    write_sentencepiece(tmp_path / "tokenizer", english(300), "bpe", 500)
    pairs = sentencepiece_pairs(tmp_path / "tokenizer")
    export_gguf(import_tokenizer(tmp_path, pairs), tmp_path / "again.gguf")
    metadata, _ = read_gguf(tmp_path / "again.gguf")
    fillers = {"tokenizer.ggml.scores": pairs.pop("tokenizer.ggml.scores")[:-2]}
    assert {name: metadata[name] for name in pairs} == pairs
    np.testing.assert_array_equal(metadata["tokenizer.ggml.scores"][:-2], np.float32(fillers["tokenizer.ggml.scores"]))
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    assert metadata["tokenizer.ggml.add_space_prefix"] is True


@pytest.mark.parametrize("kind", ["gpt2", "sentencepiece"])
def test_an_extended_tokenizer_cuts_text_in_transformers_as_it_did(tmp_path, kind):
    if kind == "gpt2":
        write_tokenizer(tmp_path / "old", english(300), 400)
    else:
        write_sentencepiece(tmp_path / "old", english(300), "bpe", 400)
    write_jsonl(tmp_path / "zh.jsonl", chinese(300))
    command = ["tokenizer", "extend", "--base", tmp_path / "old", "--corpus", tmp_path / "zh.jsonl"]
    main([str(word) for word in [*command, "--new-tokens", 50, "--out", tmp_path / "new"]])
    ours = Tokenizer(tmp_path / "new")
    assert ours.size > Tokenizer(tmp_path / "old").size + 40
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": ours.size}, **rope(1e4))
    export_gguf(directory_of(tmp_path / "model", config, tmp_path / "new"), tmp_path / "model.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in [*chinese(320)[300:], *TEXTS[:8]]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text


def refused(directory: Path, message: str, kind=None) -> None:
    with pytest.raises(UserError, match=message):
        export_gguf(directory, directory.parent / "model.gguf", kind)
    assert sorted(path.name for path in directory.parent.iterdir()) == [directory.name]


def test_what_gguf_cannot_say_is_refused_and_nothing_is_left(tmp_path):
    arcee = transformers.ArceeConfig(**SIZES, **rope(1e4))
    refused(directory_of(tmp_path / "arcee", arcee), r"'arcee' cannot be written as GGUF; those that can: llama")
    shutil.rmtree(tmp_path / "arcee")
    biased = transformers.LlamaConfig(**SIZES, **rope(1e4), attention_bias=True)
    refused(directory_of(tmp_path / "biased", biased), "biases or an activation")
    shutil.rmtree(tmp_path / "biased")
    parts = transformers.Qwen2Config(
        **SIZES, **rope(1e6), use_sliding_window=True, sliding_window=7, max_window_layers=1
    )
    refused(directory_of(tmp_path / "parts", parts), "layers with a window and layers without")
    shutil.rmtree(tmp_path / "parts")
    dynamic = transformers.LlamaConfig(**SIZES, **rope(1e4, rope_type="dynamic", factor=2.0))
    refused(directory_of(tmp_path / "dynamic", dynamic), "DynamicNTK cannot be written")
    shutil.rmtree(tmp_path / "dynamic")
    # YaRN's factor on cosines, which llama.cpp computes by itself.
    yarn = rope(1e6, rope_type="yarn", factor=4.0, original_max_position_embeddings=128, attention_factor=1.5)
    refused(
        directory_of(tmp_path / "yarn", transformers.Qwen2Config(**SIZES, **yarn)),
        "cannot say this model's layer_kinds",
    )
    shutil.rmtree(tmp_path / "yarn")
    model = build(MODELS["llama"])
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    model.save_pretrained(tmp_path / "large")
    write_tokenizer(tmp_path / "large", english(50), 310)
    refused(tmp_path / "large", r"up_proj.weight holds 100000, beyond float16: give --type bf16", "f16")


def test_a_tokenizer_that_gguf_cannot_say_is_refused(tmp_path):
    directory = directory_of(tmp_path / "model", MODELS["llama"])
    document = json.loads((directory / "tokenizer.json").read_text())
    other = document | {"pre_tokenizer": {"type": "Digits", "individual_digits": True}}
    (directory / "tokenizer.json").write_text(json.dumps(other))
    refused(directory, "in a way that is none of smollm, gpt-2, qwen2, llama-bpe")
    whole_words = document | {"model": document["model"] | {"ignore_merges": True}}
    (directory / "tokenizer.json").write_text(json.dumps(whole_words))
    refused(directory, "in a way that is none of")
    (directory / "tokenizer.json").write_text(json.dumps(document | {"normalizer": {"type": "NFKC"}}))
    refused(directory, "in a way that is none of")
    (directory / "tokenizer.json").unlink()
    write_sentencepiece(directory, english(300), "unigram", 300)
    refused(directory, r"byte-level BPE can, and SentencePiece BPE with its tokenizer.model")
    # Its normalizer is no part of the file.
    write_sentencepiece(directory, english(300), "bpe", 300, normalization_rule_name="nfkc")
    refused(directory, "would be cut otherwise by what GGUF says of this tokenizer")


def test_the_command_writes_one_file_and_replaces_none(tmp_path, capsys):
    directory = directory_of(tmp_path / "model", MODELS["qwen3"])
    command = ["model", "export-gguf", "--model", str(directory), "--out", str(tmp_path / "m.gguf"), "--type", "q8_0"]
    main(command)
    assert capsys.readouterr().out == f"{tmp_path / 'm.gguf'}\n"
    assert {each.tensor_type.name for each in read_gguf(tmp_path / "m.gguf")[1].values()} == {"F32", "Q8_0"}
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert "m.gguf exists" in capsys.readouterr().err
    assert GGUF_KINDS == KINDS


def test_a_window_that_llama_cpp_does_not_have_is_told(tmp_path, capsys):
    for name in ("mistral", "gemma2", "llama"):
        export_gguf(directory_of(tmp_path / name, MODELS[name]), tmp_path / f"{name}.gguf")
        told = "llama.cpp has no window in a llama: of a text of more than 7 tokens it sees all"
        assert (told in capsys.readouterr().err) == (name == "mistral")


def test_a_model_without_some_tensor_is_refused(tmp_path):
    directory = directory_of(tmp_path / "model", MODELS["llama"])
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(directory, r"lacks 9 tensors, 'model.layers.2.self_attn.q_proj.weight' first")


OTHER = {
    "Gemma 2, untied": (dict(tie_word_embeddings=False), "gemma2", "tie_word_embeddings=False, which a gemma2"),
    "Gemma 2, another scale": (dict(query_pre_attn_scalar=100), "gemma2", "cannot say this model's attention_scale"),
    "Gemma 2, no cap": (dict(final_logit_softcapping=None), "gemma2", "cannot say this model's logit_softcap"),
    "Gemma 2, an activation": (dict(hidden_activation="gelu"), "gemma2", "biases or an activation"),
    "SmolLM3, other layers": (
        dict(no_rope_layers=[1, 0] * 3 + [1]),
        "smollm3",
        "cannot say this model's layer_pattern",
    ),
    "OLMo 2, tied": (dict(tie_word_embeddings=True), "olmo2", "tie_word_embeddings=True, which a olmo2"),
    "OLMo 2, wide heads": (dict(head_dim=128), "olmo2", "heads of 128 numbers, which a olmo2"),
    "experts, not renormalised": (dict(norm_topk_prob=False), "qwen3moe", "cannot say this model's experts"),
    "Qwen 2, Llama 3's RoPE": (rope(5e5, **LLAMA3, factor=8.0), "qwen2", "Llama3 cannot be written as GGUF: a qwen2"),
}


@pytest.mark.parametrize(("changes", "name", "message"), OTHER.values(), ids=OTHER)
def test_what_llama_cpp_takes_for_granted_is_refused_otherwise(tmp_path, changes, name, message):
    config = copy.deepcopy(MODELS[name])
    refused(directory_of(tmp_path / "model", type(config)(**config.to_dict() | changes)), message)


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path):
    directory = directory_of(tmp_path / "model", MODELS["llama"])
    write_tokenizer(directory, english(50), 330)
    refused(directory, "has 330 ids, the embedding 320 rows: run `cpt model extend`")
    # Gemma 3's rows are one less than its tokens: none of text is beyond them.
    write_tokenizer(directory, english(50), 320)
    document = json.loads((directory / "tokenizer.json").read_text())
    image = document["added_tokens"][0] | {"id": 320, "content": "<image>", "special": True}
    document["added_tokens"].append(image)
    (directory / "tokenizer.json").write_text(json.dumps(document))
    assert Tokenizer(directory).size == 321
    export_gguf(directory, tmp_path / "model.gguf")
    assert len(read_gguf(tmp_path / "model.gguf")[0]["tokenizer.ggml.tokens"]) == 320


def test_tokens_beyond_the_pieces_are_fillers(tmp_path):
    directory = directory_of(tmp_path / "model", MODELS["llama"])
    export_gguf(directory, tmp_path / "model.gguf")
    metadata, _ = read_gguf(tmp_path / "model.gguf")
    size = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size()
    assert metadata["tokenizer.ggml.tokens"][size:] == [f"[PAD{index}]" for index in range(size, 320)]
    assert metadata["tokenizer.ggml.token_type"][size:] == [5] * (320 - size)
