"""gpt-oss as it is released, its experts in MXFP4: read as transformers reads them, written in bfloat16."""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from contracts.family_configs import config_json
from inputs import random_weights
from peft_models import ours, theirs
from safetensors.numpy import load_file, save_file

from cpt_jax.checkpoint.hf import load
from cpt_jax.checkpoint.hf_write import save
from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import flatten
from cpt_jax.models.families import family_for
from cpt_jax.report.many import _parameters

MXFP4 = dict(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn"])
EXPERTS = "model.layers.{}.mlp.experts.{}"


def released(directory: Path) -> dict[str, np.ndarray]:
    """A small random gpt-oss with files as the released ones: its packed tensors, which lie in two files."""
    raw = config_json("gpt_oss", "as released") | dict(intermediate_size=64)
    config = family_for(raw).config_from_hf(raw)
    save(directory, config, random_weights(config), raw, directory.parent, dtype=ml_dtypes.bfloat16)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    generator, packed = np.random.default_rng(0), {}
    for layer in range(raw["num_hidden_layers"]):
        for part in ("gate_up_proj", "down_proj"):
            count, inputs, outputs = tensors.pop(name := EXPERTS.format(layer, part)).shape
            packed[f"{name}_blocks"] = generator.integers(0, 256, (count, outputs, inputs // 32, 16), np.uint8)
            # Matrices of some tenths; a few blocks are as small as there are, or some hundreds.
            scales = generator.integers(120, 126, (count, outputs, inputs // 32)).astype(np.uint8)
            scales[0, :2, 0] = 0, 135
            packed[f"{name}_scales"] = scales
    everything = tensors | packed
    files = {name: f"model-0000{1 + name.endswith('_scales')}-of-00002.safetensors" for name in everything}
    for file in set(files.values()):
        save_file({name: value for name, value in everything.items() if files[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (directory / "config.json").write_text(json.dumps(raw | dict(quantization_config=MXFP4)))
    return packed


def unpacked(packed: dict[str, np.ndarray], layer: int, part: str) -> np.ndarray:
    """[experts, inputs, outputs], as transformers has it."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    name = EXPERTS.format(layer, part)
    parts = (torch.tensor(packed[f"{name}{end}"]) for end in ("_blocks", "_scales"))
    return convert_moe_packed_tensors(*parts, dtype=torch.bfloat16).float().numpy()


def test_packed_experts_are_read_as_transformers_reads_them(tmp_path):
    packed = released(tmp_path / "model")
    _, weights, _ = load(tmp_path / "model")
    flat = flatten(weights)
    assert _parameters(str(tmp_path / "model")) == sum(leaf.size for leaf in flat.values())
    for layer in range(3):
        whole = unpacked(packed, layer, "gate_up_proj")
        expected = {"gate": whole[..., ::2], "up": whole[..., 1::2], "down": unpacked(packed, layer, "down_proj")}
        for name, kernel in expected.items():
            leaf = flat[f"layers/mlp/{name}/kernel"]
            assert leaf.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(np.asarray(leaf[layer], np.float32), kernel, err_msg=name)
            # A part of one expert.
            part = leaf[layer, 2, 5:37, 3:10]
            np.testing.assert_array_equal(part.astype(np.float32), kernel[2, 5:37, 3:10], err_msg=name)


def test_what_is_written_of_it_is_bfloat16_and_the_same_model(tmp_path):
    released(tmp_path / "model")
    config, weights, raw = load(tmp_path / "model")
    save(tmp_path / "out", config, weights, raw, tmp_path, origin=tmp_path / "model", dtype=ml_dtypes.bfloat16)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {name: value for name, value in raw.items() if name != "quantization_config"} | {
        "dtype": "bfloat16"
    }
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {array.dtype for array in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert tensors[EXPERTS.format(1, "gate_up_proj")].shape == (6, 32, 128)
    again = flatten(load(tmp_path / "out")[1])
    for path, leaf in flatten(weights).items():
        np.testing.assert_array_equal(np.asarray(again[path]), np.asarray(leaf), err_msg=path)
    arrays = {path: jnp.asarray(np.asarray(leaf, np.float32)) for path, leaf in flatten(weights).items()}
    found, expected = ours(config, arrays), theirs(tmp_path / "out", dtype="float32")
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def edited(directory: Path, change) -> None:
    path = directory / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, name: tensors.pop(name), "there is no .*down_proj_scales: fetch the model"),
        (
            lambda tensors, name: tensors.update({name: tensors[name][..., :1]}),
            r"down_proj_scales has shape \[6, 32, 1\], its blocks \[6, 32, 2, 16\]: fetch the model again",
        ),
    ],
    ids=["missing", "of other blocks"],
)
def test_scales_that_are_not_those_of_the_blocks_are_refused(change, said, tmp_path):
    released(tmp_path / "model")
    edited(tmp_path / "model", lambda tensors: change(tensors, EXPERTS.format(1, "down_proj") + "_scales"))
    with pytest.raises(UserError, match=said):
        load(tmp_path / "model")
