"""Hugging Face directories: an exact round trip, and every way in which one can be wrong."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from contracts.family_configs import config_json
from inputs import hf_config, random_weights, tiny_config
from safetensors.numpy import load_file, save_file

from cpt_jax.checkpoint import hf
from cpt_jax.checkpoint.base import resolve_base
from cpt_jax.checkpoint.hf import load
from cpt_jax.checkpoint.hf_write import SHARD_BYTES, save
from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import flatten
from cpt_jax.models.families import family_for


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [SHARD_BYTES, 20_000])
def test_what_is_saved_is_loaded_exactly(tmp_path, tied, shard_bytes):
    config = tiny_config(tie_word_embeddings=tied)
    weights = random_weights(config)
    save(tmp_path / "model", config, weights, hf_config(config), tmp_path, shard_bytes=shard_bytes)
    assert (tmp_path / "model" / hf.INDEX).exists() == (shard_bytes == 20_000)
    again, loaded, _ = load(tmp_path / "model")
    assert again == config
    for path, leaf in flatten(weights).items():
        np.testing.assert_array_equal(flatten(loaded)[path], leaf)


def test_base_and_new_rows_are_saved_as_one_table(tmp_path):
    config = tiny_config(new_rows=7)
    weights = random_weights(config)
    save(tmp_path / "model", config, weights, hf_config(config), tmp_path)
    table = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(table, np.concatenate([weights["embed"]["base"], weights["embed"]["new"]]))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] == 327


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_5_text", "mtp.fc.weight"),
        ("qwen3_next", "mtp.fc.weight"),
        ("ernie4_5_moe", "model.mtp_linear_proj.0.weight"),
        ("glm4_moe", "model.layers.3.eh_proj.weight"),
        ("deepseek_v3", "model.layers.3.eh_proj.weight"),
    ],
)
def test_what_predicts_several_tokens_goes_along_as_it_is(model_type, name, tmp_path):
    raw = config_json(model_type, "as released")
    config = family_for(raw).config_from_hf(raw)
    save(tmp_path / "base", config, random_weights(config), raw, tmp_path)
    beside = {name: np.arange(8, dtype=np.float16).reshape(2, 4)}
    edit_tensors(tmp_path / "base", lambda tensors: tensors.update(beside))
    save(tmp_path / "out", *load(tmp_path / "base"), tmp_path, origin=tmp_path / "base")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    np.testing.assert_array_equal(written[name], beside[name], strict=True)


def test_a_correction_bias_is_written_in_float32(tmp_path):
    """It decides the choice of experts: another bias, rounded, would choose others."""
    raw = config_json("glm4_moe", "as released")
    config = family_for(raw).config_from_hf(raw)
    weights = random_weights(config)
    save(tmp_path, config, weights, raw, tmp_path, dtype=ml_dtypes.bfloat16)
    written = load_file(tmp_path / "model.safetensors")
    name = "model.layers.{}.mlp.gate.e_score_correction_bias"
    for layer, bias in enumerate(weights["layers"]["mlp"]["correction_bias"], start=1):
        np.testing.assert_array_equal(written[name.format(layer)], bias, strict=True)
    assert written["model.layers.1.mlp.gate.weight"].dtype == ml_dtypes.bfloat16


def test_single_numbers_of_layers_have_no_rows(tmp_path):
    """By its rows a leaf is read by several processes."""
    raw = config_json("apertus", "as released")
    config = family_for(raw).config_from_hf(raw)
    save(tmp_path, config, random_weights(config), raw, tmp_path)
    leaves = flatten(load(tmp_path)[1])
    assert leaves["layers/mlp/xielu/beta"].row_axis is None
    assert leaves["layers/mlp/xielu/alpha_p"].row_axis == 1
    assert leaves["layers/mlp/up/kernel"].row_axis == 2


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickle_only(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def eight_bits(directory: Path) -> None:
    path = directory / "model.safetensors"
    # Of the same length, so that the rest stays where it is.
    path.write_bytes(path.read_bytes().replace(b'"dtype": "F32"', b'"dtype": "U16"', 1))


WRONG = {
    "type": (eight_bits, "holds .* as U16, which is not supported: give the model in float32"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no weights"),
    "pickle": (pickle_only, "pickle only .*convert them to safetensors"),
    "truncated": (truncate, "truncated or corrupt"),
    "header cut": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:50]),
        "truncated or corrupt",
    ),
    "no safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"<html>" * 99), "truncated or corrupt"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "config cut": (lambda d: (d / "config.json").write_text('{"model_type": "ll'), "not valid JSON"),
    "architecture": (
        lambda d: edit_config(d, model_type="mamba"),
        "model_type 'mamba'.* is not supported; supported: .*gemma2, .*llama",
    ),
    "rope scaling": (
        lambda d: edit_config(d, rope_scaling={"rope_type": "spiral", "factor": 2}),
        "RoPE of type 'spiral'",
    ),
    "no object": (lambda d: (d / "config.json").write_text("[]"), "holds a list, not an object"),
    "a text for a number": (
        lambda d: edit_config(d, hidden_size="32"),
        "no llama config .* 'hidden_size' expected int",
    ),
    "rope without a number": (
        lambda d: edit_config(d, rope_scaling={"type": "linear", "factor": None}),
        "RoPE of type 'linear' has a field that is no number",
    ),
    "no theta": (lambda d: edit_config(d, rope_theta=None), "RoPE of type 'default' has a field that is no number"),
    "a part of each head turned": (
        lambda d: edit_config(d, partial_rotary_factor=0.5),
        "partial_rotary_factor=0.5, which is not supported for model_type llama",
    ),
    "remote code": (
        lambda d: edit_config(d, model_type="mine", auto_map={"AutoModelForCausalLM": "m.M"}),
        "auto_map, is never executed",
    ),
    "quantised": (lambda d: edit_config(d, quantization_config={"bits": 4}), "quantization_config={'bits': 4}"),
    "activation": (lambda d: edit_config(d, hidden_act="swish2"), "activation 'swish2' is not supported"),
    "bias": (lambda d: edit_config(d, attention_bias=True), "lacks 8 tensors, 'model.layers.0.self_attn.q_proj.bias'"),
    "field missing": (
        lambda d: (d / "config.json").write_text('{"model_type": "llama"}'),
        "lacks the field 'vocab_size'",
    ),
    "tensor missing": (
        lambda d: edit_tensors(d, lambda t: t.pop("model.norm.weight")),
        "lacks 1 tensors, 'model.norm.weight' first",
    ),
    "tensor too many": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.extra": np.zeros(2, np.float32)})),
        "tensor 'model.extra' that this architecture does not have",
    ),
    "head that is not tied": (
        lambda d: edit_tensors(d, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        "holds lm_head.weight, which is not model.embed_tokens.weight, .*tie_word_embeddings=true: set it to false",
    ),
    "head of other rows": (
        lambda d: edit_tensors(d, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"][:9]})),
        "holds lm_head.weight, which is not",
    ),
    "rows": (
        lambda d: edit_config(d, vocab_size=400),
        r"shape \[320, 32\], config.json asks for \[400, 32\]: run `cpt model extend`",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_wrong_directories_are_refused(tiny_model, tmp_path, spoil, message):
    shutil.copytree(tiny_model, tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "model")


def test_a_tied_head_may_be_stored_besides(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "CHUNK_VALUES", 1000)
    shutil.copytree(tiny_model, tmp_path / "model")
    edit_tensors(tmp_path / "model", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert load(tmp_path / "model")[0].tie_word_embeddings


def test_layers_that_are_stored_in_other_types_lose_nothing(tmp_path):
    """The leaf that stacks them is of a type that holds all of them; the grown model too."""
    config = tiny_config()
    weights = random_weights(config)
    save(tmp_path / "model", config, weights, hf_config(config), tmp_path)

    def change(tensors) -> None:
        for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    edit_tensors(tmp_path / "model", change)
    loaded = flatten(load(tmp_path / "model")[1])
    kernel = np.asarray(loaded["layers/mlp/up/kernel"])
    np.testing.assert_array_equal(kernel[1:], weights["layers"]["mlp"]["up"]["kernel"][1:])
    assert loaded["embed/base"].dtype == ml_dtypes.bfloat16
    assert hf.widest(leaf.dtype for leaf in loaded.values()) == np.float32
    assert hf.widest([np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]) == np.float32
    assert hf.widest([np.dtype(np.float64), np.dtype(ml_dtypes.bfloat16)]) == np.float64


def test_an_index_that_an_earlier_save_left_is_passed_over(tiny_model, tmp_path):
    """As by transformers, in a directory and in a store."""
    import fsspec

    shutil.copytree(tiny_model, tmp_path / "model")
    stale = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model" / hf.INDEX).write_text(json.dumps(stale))
    load(tmp_path / "model")
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "model"), "/stale/model", recursive=True)
    load(resolve_base("memory://stale/model", tmp_path / "cache"))
    store.rm("/stale", recursive=True)


@pytest.mark.parametrize("shard_bytes", [SHARD_BYTES, 20_000])
def test_a_model_in_an_object_store_is_read_where_it_lies(tiny_model, tmp_path, shard_bytes):
    """Only the small files are copied; the weights are ranges of remote files."""
    import fsspec

    config, weights, raw = load(tiny_model)
    save(tmp_path / "model", config, weights, raw, tiny_model, shard_bytes=shard_bytes)
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "model"), "/bucket/model", recursive=True)
    view = resolve_base("memory://bucket/model", tmp_path / "cache")
    assert not list(view.glob("*.safetensors"))
    assert (view / "tokenizer.json").exists()
    again, found, _ = load(view)
    assert again == config
    for path, leaf in flatten(weights).items():
        np.testing.assert_array_equal(flatten(found)[path], leaf, err_msg=path)
    before = {path: path.stat().st_mtime_ns for path in view.iterdir()}
    resolve_base("memory://bucket/model", tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in view.iterdir()} == before, "a run that continues finds its base"
    part = flatten(found)["layers/mlp/up/kernel"][1, 3:5, 7:9]
    np.testing.assert_array_equal(part, np.asarray(flatten(weights)["layers/mlp/up/kernel"])[1, 3:5, 7:9])
    with pytest.raises(UserError, match="memory://bucket/nothing cannot be read"):
        resolve_base("memory://bucket/nothing", tmp_path / "other")
    store.rm("/bucket", recursive=True)


@pytest.mark.parametrize("name", ["no/such/place", "missing.gguf", "./model"])
def test_a_base_that_is_nowhere_is_told(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"neither a model directory|does not exist"):
        resolve_base(name, tmp_path / "cache")


def hub(monkeypatch, directory: Path) -> list[tuple[str, list[str]]]:
    """Every hub id is in this directory; what was asked for: ids, and which of the files that hubs have."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"]
    others = ["consolidated.safetensors", "original/model.safetensors", "onnx/config.json", "pytorch_model.bin", "x.py"]
    asked = []

    def snapshot_download(name, revision, **patterns):
        name += "" if revision is None else f" at {revision}"
        asked.append((name, list(filter_repo_objects([*files, *others], **patterns))))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_hub_id_is_fetched_without_pickles_and_weights_twice(tmp_path, monkeypatch):
    asked = hub(monkeypatch, tmp_path)
    assert resolve_base("HuggingFaceTB/SmolLM2-135M", tmp_path / "cache") == tmp_path
    ((name, files),) = asked
    assert name == "HuggingFaceTB/SmolLM2-135M"
    assert files == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"]


def test_a_hub_id_may_name_a_revision(tmp_path, monkeypatch):
    asked = hub(monkeypatch, tmp_path)
    resolve_base("HuggingFaceTB/SmolLM2-135M@refs/pr/1", tmp_path / "cache")
    assert [name for name, _ in asked] == ["HuggingFaceTB/SmolLM2-135M at refs/pr/1"]


def test_of_a_hub_id_a_tokenizer_is_fetched_without_weights(tmp_path, monkeypatch):
    """But for an adapter without one, whose base has it."""
    asked = hub(monkeypatch, tmp_path)
    assert resolve_base("a/b", tmp_path / "cache", weights=False) == tmp_path
    assert [files for _, files in asked] == [["config.json", "tokenizer.json", "tokenizer.model"]]
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": []}'
    )
    with pytest.raises(UserError, match="does not say what its base is"):
        resolve_base("a/b", tmp_path / "cache", weights=False)
    assert "model.safetensors" in asked[-1][1]
    (tmp_path / "tokenizer.json").touch()
    assert resolve_base("a/b", tmp_path / "cache", weights=False) == tmp_path
