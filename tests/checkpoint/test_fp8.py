"""Files in FP8, with a scale for each block or one a matrix: read as transformers reads them, written in bfloat16."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from inputs import hf_config, random_weights, tiny_config
from safetensors.numpy import load_file, save_file

from cpt_jax.checkpoint.hf import load
from cpt_jax.checkpoint.hf_write import save
from cpt_jax.checkpoint.packed import with_unpacked
from cpt_jax.checkpoint.safetensors_file import SafetensorsFile
from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import flatten
from cpt_jax.models.families import family_for
from cpt_jax.report.many import _parameters

BLOCKS = dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128], activation_scheme="dynamic")
WHOLE = dict(quant_method="fp8", weight_block_size=None, activation_scheme="static")


def packed(array: np.ndarray, blocks: bool) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of eight bits, their scales) of a matrix or a stack of them."""
    rows, columns = array.shape[-2:]
    if blocks:
        grid = [
            [np.abs(array[..., i : i + 128, j : j + 128]).max((-2, -1)) for j in range(0, columns, 128)]
            for i in range(0, rows, 128)
        ]
        scales = np.moveaxis(np.array(grid, np.float32), (0, 1), (-2, -1)) / 448
        each = scales.repeat(128, -2).repeat(128, -1)[..., :rows, :columns]
    else:
        scales = each = np.float32(np.abs(array).max() / 448)
    return (array / each).astype(ml_dtypes.float8_e4m3fn), np.array(scales, np.float32, order="C")


def released(directory: Path, blocks: bool, **sizes) -> dict[str, np.ndarray]:
    """A small random Llama whose linears are in FP8: each of them as it is to be read."""
    config = tiny_config(
        **dict(hidden_size=256, intermediate_size=384, num_heads=4, num_kv_heads=2, head_dim=64) | sizes
    )
    save(directory, config, random_weights(config), hf_config(config), directory.parent, dtype=ml_dtypes.bfloat16)
    path, read = directory / "model.safetensors", {}
    tensors = load_file(path)
    for name in [name for name in tensors if "_proj" in name]:
        numbers, scales = packed(tensors[name].astype(np.float32), blocks)
        tensors |= {name: numbers, f"{name}_scale_inv": scales}
        each = scales.repeat(128, -2).repeat(128, -1)[: numbers.shape[0], : numbers.shape[1]] if blocks else scales
        read[name] = (numbers.astype(np.float32) * each).astype(ml_dtypes.bfloat16)
        if not blocks:
            tensors[name.replace(".weight", ".activation_scale")] = np.array(0.5, np.float32)
    save_file(tensors, path)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | dict(quantization_config=BLOCKS if blocks else WHOLE)))
    return read


@pytest.mark.parametrize("blocks", [True, False], ids=["a scale a block", "a scale a matrix"])
def test_files_in_fp8_are_read_as_transformers_reads_them_and_written_in_bfloat16(blocks, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    expected = released(tmp_path / "model", blocks)
    config, weights, raw = load(tmp_path / "model")
    assert _parameters(str(tmp_path / "model")) == sum(leaf.size for leaf in flatten(weights).values())
    save(tmp_path / "out", config, weights, raw, tmp_path, origin=tmp_path / "model", dtype=ml_dtypes.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {array.dtype for array in written.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not any("scale" in name for name in written)
    for name, array in expected.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )
    found = theirs.state_dict()
    for name, array in written.items():
        np.testing.assert_array_equal(array.astype(np.float32), found[name].float().numpy(), err_msg=name)


def test_parts_of_matrices_and_of_stacks_are_read_with_their_own_scales(tmp_path):
    generator = np.random.default_rng(0)
    whole = {"matrix": generator.normal(size=(300, 200)), "stack": generator.normal(size=(3, 150, 260))}
    tensors, expected = {}, {}
    for name, array in whole.items():
        # Blocks whose numbers are of another size each.
        array = array * np.exp2(np.arange(array.shape[-2]) // 128)[:, None]
        numbers, scales = packed(array.astype(np.float32), blocks=True)
        tensors |= {name: numbers, f"{name}_scale_inv": scales}
        each = scales.repeat(128, -2).repeat(128, -1)[..., : array.shape[-2], : array.shape[-1]]
        expected[name] = (numbers.astype(np.float32) * each).astype(ml_dtypes.bfloat16)
        np.testing.assert_allclose(expected[name].astype(np.float32), array, rtol=0.08, atol=0.02 * np.abs(array).max())
    save_file(tensors, tmp_path / "model.safetensors")
    file = SafetensorsFile(tmp_path / "model.safetensors")
    held = with_unpacked({name: file for name in file.tensors})
    assert {name: found.tensors[name].shape for name, found in held.items()} == {
        name: array.shape for name, array in whole.items()
    }
    np.testing.assert_array_equal(held["matrix"].read("matrix"), expected["matrix"])
    np.testing.assert_array_equal(held["stack"].read("stack"), expected["stack"])
    np.testing.assert_array_equal(held["stack"].read("stack", slice(1, 3)), expected["stack"][1:])
    for rows in (slice(0, 5), slice(100, 140), slice(130, 300)):
        np.testing.assert_array_equal(held["matrix"].read("matrix", rows), expected["matrix"][rows])
    np.testing.assert_array_equal(held["stack"].read("stack", slice(120, 150), 2), expected["stack"][2, 120:150])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tensors, name: tensors.pop(name),
            "q_proj.weight in FP8, and there is no .*_scale_inv: fetch the model",
        ),
        (
            lambda tensors, name: tensors.update({name: tensors[name][:1].clone()}),
            r"q_proj.weight_scale_inv has shape \[1, 2\], blocks of 128 x 128 of \[256, 256\] are \[2, 2\]: fetch",
        ),
    ],
    ids=["missing", "of other blocks"],
)
def test_scales_that_are_not_those_of_the_numbers_are_refused(change, said, tmp_path):
    from safetensors.torch import load_file, save_file

    released(tmp_path / "model", blocks=True)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    change(tensors, "model.layers.1.self_attn.q_proj.weight_scale_inv")
    save_file(tensors, path)
    with pytest.raises(UserError, match=said):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    "given",
    [BLOCKS | dict(fmt="e5m2"), BLOCKS | dict(weight_block_size=[64, 64]), BLOCKS | dict(quant_method="gptq"), "fp8"],
)
def test_what_is_quantised_otherwise_is_refused(given):
    raw = hf_config(tiny_config()) | dict(quantization_config=given)
    with pytest.raises(UserError, match=r"quantization_config=.* is not supported for model_type llama"):
        family_for(raw).config_from_hf(raw)


@pytest.mark.parametrize("given", [BLOCKS, WHOLE, BLOCKS | dict(fmt="float8_e4m3fn")])
def test_a_model_within_one_that_sees_is_read_too(given):
    raw = dict(model_type="mistral3", text_config=hf_config(tiny_config()) | dict(model_type="ministral3"))
    config = family_for(raw).config_from_hf(raw)
    assert family_for(raw).config_from_hf(raw | dict(quantization_config=given)) == config
