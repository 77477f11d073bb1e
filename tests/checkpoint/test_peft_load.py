"""Adapters trained by PEFT, as we read them."""

import dataclasses

import numpy as np
import pytest
from contracts.family_configs import config_json
from contracts.test_families import reference_model
from peft_models import NEW_ROWS, QUERIES, ROWS, edit, edit_tensors, ours, saved, theirs, train_with_peft, trained
from safetensors.numpy import load_file, save_file

from cpt_jax.checkpoint.base import resolve_base
from cpt_jax.checkpoint.peft import load_adapter
from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import flatten
from cpt_jax.models.linear import LoRAConfig
from cpt_jax.recipe.model import load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # PEFT looks for the pattern among modules, not among the parameters that it does apply it to.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match.*(gate_up|down)_proj"),
]
QUERY_PATHS = ("layers/attention/q", "layers/attention/v")
ATTENTION = [*QUERIES, "k_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TRAINED_BY_PEFT = {
    "rows, tied": ("llama", "tied, odd head dimension", dict(target_modules=QUERIES, trainable_token_indices=ROWS)),
    "rows, untied": (
        "llama",
        "linear",
        dict(target_modules=ATTENTION, trainable_token_indices={"embed_tokens": ROWS, "lm_head": ROWS}),
    ),
    "old rows too": (
        "llama",
        "linear",
        dict(target_modules=QUERIES, trainable_token_indices={"embed_tokens": [4, 63], "lm_head": [60]}),
    ),
    "whole tables": ("llama", "linear", dict(target_modules=QUERIES, modules_to_save=["embed_tokens", "lm_head"])),
    "whole tables, tied": (
        "qwen2",
        "tied",
        dict(target_modules=QUERIES, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "ranks and scales": (
        "llama",
        "linear",
        dict(target_modules="all-linear", rank_pattern={"v_proj": 6, "layers.1.*up_proj": 2})
        | dict(alpha_pattern={"down_proj": 3, "layers.2.self_attn.q_proj": 16}),
    ),
    "rank-stabilised": ("qwen2", "tied", dict(target_modules=ATTENTION, use_rslora=True, rank_pattern={"k_proj": 5})),
    "DoRA": ("llama", "untied, no grouping, biases", dict(target_modules=QUERIES, use_dora=True)),
    "DoRA, rank-stabilised, patterns": (
        "qwen2",
        "tied",
        dict(target_modules="all-linear", use_dora=True, use_rslora=True)
        | dict(rank_pattern={"k_proj": 5}, alpha_pattern={".*mlp.*": 3}),
    ),
    "DoRA of fused layers": ("phi3", "window", dict(target_modules="all-linear", use_dora=True)),
    "norms": ("gemma2", "as released", dict(target_modules=QUERIES, modules_to_save=["norm"])),
    "norms and tables": (
        "gpt_neox",
        "as released",
        dict(target_modules="all-linear", modules_to_save=["norm", "embed_in", "lm_head"]),
    ),
    "some layers": ("gemma2", "as released", dict(target_modules=ATTENTION, layers_to_transform=[0, 2])),
    "some layers by name": (
        "gemma2",
        "as released",
        dict(target_modules=ATTENTION, layers_to_transform=1, layers_pattern="layers"),
    ),
    "some layers, and one by its whole name": (
        "llama",
        "linear",
        dict(target_modules=["q_proj", "model.layers.2.mlp.up_proj"], layers_to_transform=[1]),
    ),
    "pattern": ("llama", "linear", dict(target_modules=r".*layers\.[12]\.(self_attn|mlp)\.(q|v|gate)_proj")),
    "excluded": (
        "llama",
        "linear",
        dict(target_modules="all-linear", exclude_modules=["o_proj", "layers.1.mlp.up_proj"]),
    ),
    "gaussian": ("llama", "linear", dict(target_modules=QUERIES, init_lora_weights="gaussian", lora_dropout=0.1)),
    "phi3": ("phi3", "window", dict(target_modules="all-linear", trainable_token_indices=ROWS)),
    "phi3, ranks": ("phi3", "window", dict(target_modules="all-linear", rank_pattern={"qkv_proj": 9})),
    "gpt_neox": (
        "gpt_neox",
        "as released",
        dict(target_modules="all-linear", trainable_token_indices={"embed_in": ROWS, "lm_head": ROWS}),
    ),
    "gpt_oss": ("gpt_oss", "as released", dict(target_modules=QUERIES, target_parameters=EXPERTS)),
    "qwen3_moe": ("qwen3_moe", "renormalised", dict(target_modules=QUERIES, target_parameters=EXPERTS)),
    "qwen3_moe, gates": ("qwen3_moe", "not renormalised, tied", dict(target_modules=[], target_parameters=EXPERTS[:1])),
    "qwen2_moe": ("qwen2_moe", "as released", dict(target_modules="all-linear")),
    "qwen2_moe, experts too": (
        "qwen2_moe",
        "renormalised, tied, no biases",
        dict(target_modules=[*QUERIES, "gate_proj", "down_proj"], target_parameters=EXPERTS)
        | dict(rank_pattern={"shared_expert.down_proj": 2}),
    ),
    "DoRA of qwen2_moe": ("qwen2_moe", "as released", dict(target_modules="all-linear", use_dora=True)),
    "granitemoehybrid": (
        "granitemoehybrid",
        "as released",
        dict(target_modules="all-linear", target_parameters=["block_sparse_moe.experts.down_proj"]),
    ),
    "mixtral": ("mixtral", "untied", dict(target_modules=["q_proj", "w1", "w2", "w3"])),
}


@pytest.mark.parametrize(("model_type", "name", "settings"), TRAINED_BY_PEFT.values(), ids=TRAINED_BY_PEFT)
def test_we_compute_what_peft_trained(model_type, name, settings, tmp_path):
    reference_model(config_json(model_type, name), tmp_path / "base")
    train_with_peft(tmp_path / "adapter", tmp_path / "base", settings)
    base = load_model(tmp_path / "base", 64 - NEW_ROWS)
    adapter = load_adapter(tmp_path / "adapter", base.config, base.hf_config)
    assert adapter.lora is not None
    weights = adapter.over(base.config, base.weights)
    expected = theirs(tmp_path / "base", tmp_path / "adapter")
    np.testing.assert_allclose(ours(base.config, weights, adapter.lora), expected, atol=1e-4)
    assert np.abs(expected - theirs(tmp_path / "base")).max() > 0.05
    assert adapter.base == str(tmp_path / "base")

    # Out again, and back: the same.
    before, after = flatten(base.weights), flatten(weights)
    paths = [path for path in after if path not in before or after[path] is not before[path]]
    again = dataclasses.replace(base, weights=weights, lora=adapter.lora)
    saved(again, paths, tmp_path / "again", tmp_path / "base")
    np.testing.assert_allclose(theirs(tmp_path / "base", tmp_path / "again"), expected, atol=1e-4)
    back = load_adapter(tmp_path / "again", base.config, base.hf_config)
    assert back.lora is not None
    assert (back.lora.rank, back.lora.targets) == (adapter.lora.rank, adapter.lora.targets)
    assert back.lora.default.scale == pytest.approx(adapter.lora.default.scale, rel=1e-12)
    for path, leaf in flatten(back.over(base.config, base.weights)).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(after[path]), err_msg=path)


@pytest.mark.parametrize(("model_type", "name"), [("mixtral", "untied"), ("qwen3_moe", "not renormalised, tied")])
def test_an_adapter_of_single_experts(model_type, name, tmp_path):
    """As transformers 4 had them; PEFT converts it."""
    reference_model(config_json(model_type, name), tmp_path / "base")
    base = load_model(tmp_path / "base")
    mixtral = model_type == "mixtral"
    matrices = ["w1", "w3", "w2"] if mixtral else ["gate_proj", "up_proj", "down_proj"]
    targets = ("layers/attention/q", "layers/mlp/gate", "layers/mlp/up", "layers/mlp/down")
    model, paths = trained(base, LoRAConfig(rank=2, alpha=3.0, targets=targets), ())
    saved(model, paths, tmp_path / "adapter", tmp_path / "base")
    edit(
        tmp_path / "adapter",
        target_modules=["q_proj", *matrices],
        target_parameters=None,
        rank_pattern={},
        alpha_pattern={},
    )

    def single(tensors) -> None:
        for tensor in [key for key in tensors if ".experts." in key]:
            del tensors[tensor]
        flat = flatten(model.weights)
        for mine, written in zip(("gate", "up", "down"), matrices, strict=True):
            for layer, expert in np.ndindex(flat[f"layers/mlp/{mine}/lora_a"].shape[:2]):
                block = "block_sparse_moe" if mixtral else "mlp"
                prefix = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{written}"
                for factor in "AB":
                    matrix = flat[f"layers/mlp/{mine}/lora_{factor.lower()}"][layer, expert].T
                    tensors[f"{prefix}.lora_{factor}.weight"] = np.ascontiguousarray(matrix)

    edit_tensors(tmp_path / "adapter", single)
    adapter = load_adapter(tmp_path / "adapter", base.config, base.hf_config)
    assert adapter.lora == model.lora
    for path, leaf in flatten(adapter.factors).items():
        np.testing.assert_array_equal(leaf, flatten(model.weights)[path], err_msg=path)
    expected = ours(model.config, model.weights, model.lora)
    np.testing.assert_allclose(theirs(tmp_path / "base", tmp_path / "adapter"), expected, atol=1e-4)


def test_layers_that_peft_left_out_are_zero(tmp_path):
    reference_model(config_json("llama", "linear"), tmp_path / "base")
    settings = dict(target_modules=QUERIES, layers_to_transform=[1], rank_pattern={"v_proj": 2})
    train_with_peft(tmp_path / "adapter", tmp_path / "base", settings)
    base = load_model(tmp_path / "base")
    adapter = load_adapter(tmp_path / "adapter", base.config, base.hf_config)
    assert adapter.lora == LoRAConfig(rank=4, alpha=6.0, targets=QUERY_PATHS, rank_pattern=((QUERY_PATHS[1], 2),))
    factors = flatten(adapter.factors)
    for path, leaf in factors.items():
        assert not leaf[[0, 2]].any(), path
        assert leaf[1].any(), path


def test_within_a_linear_the_largest_rank_counts(tmp_path):
    reference_model(config_json("llama", "linear"), tmp_path / "base")
    settings = dict(target_modules=QUERIES, rank_pattern={"layers.1.self_attn.v_proj": 2})
    train_with_peft(tmp_path / "adapter", tmp_path / "base", settings)
    base = load_model(tmp_path / "base")
    adapter = load_adapter(tmp_path / "adapter", base.config, base.hf_config)
    assert adapter.lora == LoRAConfig(rank=4, alpha=6.0, targets=QUERY_PATHS)
    # Of rank 2 and alpha 6, a scale of 3, twice that of the rest.
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    given = tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    second = flatten(adapter.factors)["layers/attention/v/lora_b"]
    np.testing.assert_array_equal(second[1, :2], 2 * given.T)
    assert not second[1, 2:].any()


@pytest.mark.parametrize("name", ["tied, odd head dimension", "linear"])
@pytest.mark.parametrize("tokens", [None, [64, 65]])
@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.")
def test_tables_that_were_resized_in_memory(tmp_path, name, tokens):
    """PEFT then saves both whole; the base on disk must be extended before."""
    reference_model(config_json("llama", name), tmp_path / "base")
    settings = dict(target_modules=QUERIES, trainable_token_indices=tokens)
    train_with_peft(tmp_path / "adapter", tmp_path / "base", settings, resize=66)
    with pytest.raises(UserError, match=r"not distinct ids below 64|has shape \[66, 32\]"):
        base = load_model(tmp_path / "base")
        load_adapter(tmp_path / "adapter", base.config, base.hf_config)
    reference_model(config_json("llama", name) | dict(vocab_size=66), tmp_path / "extended")
    base = load_model(tmp_path / "extended")
    adapter = load_adapter(tmp_path / "adapter", base.config, base.hf_config)
    weights = flatten(adapter.over(base.config, base.weights))
    old = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(np.asarray(weights["embed/base"])[:64], old)
    if tokens is not None:
        rows = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        delta = rows["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
        np.testing.assert_array_equal(weights["embed/base"][64:], delta)


def test_a_merged_adapter_is_made_anew_when_its_base_changes(tmp_path):
    reference_model(config_json("qwen2", "tied"), tmp_path / "base")
    train_with_peft(tmp_path / "adapter", tmp_path / "base", dict(target_modules=QUERIES))

    def norm() -> np.ndarray:
        merged = resolve_base(str(tmp_path / "adapter"), tmp_path / "cache")
        return load_file(merged / "model.safetensors")["model.norm.weight"]

    before = norm()
    made = (tmp_path / "cache" / "model.safetensors").stat()
    np.testing.assert_array_equal(norm(), before)
    assert (tmp_path / "cache" / "model.safetensors").stat().st_mtime_ns == made.st_mtime_ns
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, path, metadata={"format": "pt"})
    np.testing.assert_array_equal(norm(), before + 1)
