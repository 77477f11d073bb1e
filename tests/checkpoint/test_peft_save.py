"""Adapters trained here, as PEFT reads them: it computes what we trained, and the file holds no more than that."""

import dataclasses

import numpy as np
import pytest
from contracts.family_configs import config_json
from contracts.test_families import reference_model
from peft_models import NEW_ROWS, ours, saved, theirs, trained
from safetensors.numpy import load_file

from cpt_jax.adapt import LoRA
from cpt_jax.checkpoint.peft import load_adapter
from cpt_jax.checkpoint.peft.config import read_peft_config
from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import flatten
from cpt_jax.models.linear import LINEARS, PATHS, LoRAConfig
from cpt_jax.models.vocab_table import TABLES
from cpt_jax.recipe.model import load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # PEFT looks for the pattern among modules, not among the parameters that it does apply it to.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match.*(gate_up|down)_proj"),
]
HYBRIDS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
FAMILIES = {
    "llama, tied": ("llama", "tied, odd head dimension", LINEARS),
    "llama, untied": ("llama", "untied, no grouping, biases", ("q", "v", "down")),
    "qwen2": ("qwen2", "tied", LINEARS),
    "gemma2": ("gemma2", "as released", LINEARS),
    "phi3": ("phi3", "window", LINEARS),
    "phi3, parts of fused layers": ("phi3", "partial, tied", ("q", "v", "up")),
    "gpt_neox": ("gpt_neox", "as released", LINEARS),
    "gpt_neox, keys alone": ("gpt_neox", "tied, no biases, linear", ("k", "o")),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", "as released", LINEARS),
    "solar_open": ("solar_open", "groups, biases, two shared", LINEARS),
    "granitemoeshared": ("granitemoeshared", "as released", LINEARS),
    "apertus": ("apertus", "as released", LINEARS),
    "gpt_oss": ("gpt_oss", "as released", LINEARS),
    "gpt_oss, ups alone": ("gpt_oss", "cut off, tied, no window, another activation", ("up", "o")),
    "qwen3_moe": ("qwen3_moe", "renormalised", LINEARS),
    "qwen2_moe": ("qwen2_moe", "as released", LINEARS),
    "qwen2_moe, the shared expert alone": (
        "qwen2_moe",
        "renormalised, tied, no biases",
        ("layers/mlp/shared/*", "shared_gate"),
    ),
    "qwen3_5": ("qwen3_5_text", "as released", LINEARS),
    "qwen3_5, all there are": ("qwen3_5_text", "not periodic, one value head a key head", ("layers/*",)),
    "qwen3_5, gates alone": ("qwen3_5_text", "as released", ("layers/attention/gate", "decay")),
    "qwen3_next": ("qwen3_next", "by interval, three of four", LINEARS),
    "qwen3_5_moe, all there are": ("qwen3_5_moe_text", "by interval, three of four", ("layers/*",)),
    "falcon_h1, all that PEFT adapts": (
        "falcon_h1",
        "as released",
        ("layers/side_by_side/attention/*", "layers/side_by_side/mamba2/[!o]*", "layers/mlp/*"),
    ),
    "nemotron_h": ("nemotron_h", "as released", ("layers/mamba2/[!o]*", "layers/attention/*", "up", "down")),
    "granitemoehybrid": ("granitemoehybrid", "as released", LINEARS),
    "granitemoehybrid, parts of fused layers": (
        "granitemoehybrid",
        "without experts, not periodic, groups, steps within limits",
        ("layers/mamba2/v", "step", "up"),
    ),
    "lfm2": ("lfm2", "as released", LINEARS),
    "lfm2, parts of fused layers": ("lfm2", "untied, biases, not periodic", ("layers/short_conv/k", "q")),
    "youtu": ("youtu", "as released", LINEARS),
    "minicpm3, whole queries": ("minicpm3", "untied, whole queries, no factors, biases", ("q", "kv_b")),
    "deepseek_v3, all there are": ("deepseek_v3", "as released", ("layers/*",)),
    "glm4_moe_lite": ("glm4_moe_lite", "groups, two dense, biases", LINEARS),
    "deepseek_v2": ("deepseek_v2", "as released, small", LINEARS),
    "mistral4": ("mistral4", "groups, a dense layer, whole queries", LINEARS),
    "mixtral, gates alone": ("mixtral", "tied, one of three", ("gate", "q")),
    "mixtral, down alone": ("mixtral", "untied", ("down",)),
    "glm4_moe": ("glm4_moe", "groups, norms of heads, two dense", LINEARS),
    "lfm2_moe": ("lfm2_moe", "as released", LINEARS),
    "nemotron_h, experts in a smaller space": (
        "nemotron_h",
        "experts in a smaller space",
        ("q", "up", "down", "latent_in", "latent_out"),
    ),
    "nemotron_h, experts": ("nemotron_h", "experts", ("q", "k", "v", "up", "down")),
    "ernie4_5_moe": ("ernie4_5_moe", "as released", LINEARS),
    "minimax_m2": ("minimax_m2", "as released", LINEARS),
    "dots1": ("dots1", "as released", LINEARS),
    "exaone_moe": ("exaone_moe", "as released", ("q", "down")),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", "as released", LINEARS),
    "lfm3": ("lfm3", "as released", LINEARS),
    "gemma4_text": ("gemma4_text", "as released", LINEARS),
    "gemma4_text, experts beside": ("gemma4_text", "experts beside the feed-forward", LINEARS),
    "gemma4_text, shared keys, all there are": (
        "gemma4_text",
        "inputs of layers, shared keys, double width",
        ("layers/*",),
    ),
}


@pytest.mark.parametrize(("model_type", "name", "targets"), FAMILIES.values(), ids=FAMILIES)
def test_peft_computes_what_we_trained(model_type, name, targets, tmp_path):
    reference_model(config_json(model_type, name), tmp_path / "base")
    base = load_model(tmp_path / "base", 64 - NEW_ROWS)
    model, paths = trained(base, LoRAConfig(rank=3, alpha=4.5, targets=targets))
    held = saved(model, paths, tmp_path / "adapter", tmp_path / "base")
    assert set(held.values()) == {"rows"}
    assert len(held) == sum(f"{table}/new" in paths for table in TABLES)
    expected = ours(model.config, model.weights, model.lora)
    found = theirs(tmp_path / "base", tmp_path / "adapter")
    # A head that linear attention leaves near zero is scaled up by its norm, rounding errors too.
    np.testing.assert_allclose(found, expected, atol=5e-4 if model_type in HYBRIDS else 1e-4)
    assert np.abs(expected - theirs(tmp_path / "base")).max() > 0.1

    again = load_adapter(tmp_path / "adapter", base.config, base.hf_config)
    adapted = tuple(path for path in PATHS if f"{path}/lora_a" in flatten(model.weights))
    assert again.lora == LoRAConfig(rank=3, alpha=4.5, targets=adapted)
    assert again.base == str(tmp_path / "base")
    assert again.base_rows(64) == 64 - NEW_ROWS
    after = flatten(again.over(base.config, base.weights))
    for path, leaf in flatten(model.weights).items():
        np.testing.assert_array_equal(np.asarray(after[path]), np.asarray(leaf), err_msg=path)


@pytest.mark.parametrize(
    ("model_type", "name", "settings", "said"),
    [
        (
            "qwen3_next",
            "by interval, three of four",
            dict(targets=("layers/mlp/shared/*",), dropout=0.1),
            "PEFT has no dropout on the linears of qwen3_next that .*: leave layers/mlp/shared/. out",
        ),
        (
            "glm4_moe",
            "as released",
            dict(targets=("layers/mlp/shared/up", "layers/dense/mlp/*"), dora=True),
            "PEFT has no DoRA on the linears of glm4_moe that .*: leave layers/dense/mlp/., layers/mlp/shared/. out",
        ),
        (
            "falcon_h1",
            "as released",
            dict(targets=("o",)),
            "PEFT adapts no out_proj of falcon_h1: leave 'layers/side_by_side/mamba2/o' out",
        ),
    ],
)
def test_what_peft_does_not_adapt_is_refused(model_type, name, settings, said, tmp_path):
    reference_model(config_json(model_type, name), tmp_path / "base")
    model, paths = trained(load_model(tmp_path / "base"), LoRAConfig(rank=3, alpha=4.5, **settings))
    with pytest.raises(UserError, match=said):
        saved(model, paths, tmp_path / "adapter", tmp_path / "base")


SHARED = "layers/mlp/shared/*"
VARIANTS = {
    "rank-stabilised": ("llama", "linear", dict(scaling="alpha/sqrt(rank)"), False),
    "ranks and alphas": (
        "qwen2",
        "tied",
        dict(rank_pattern=(("layers/mlp/*", 5),), alpha_pattern=(("q", 7.0),)),
        False,
    ),
    "dora": ("llama", "untied, no grouping, biases", dict(dora=True), True),
    "dora, parts of fused layers": ("phi3", "window", dict(dora=True, targets=("q", "v", "up")), False),
    "scales within fused layers": (
        "phi3",
        "window",
        dict(alpha_pattern=(("v", 1.0),), rank_pattern=(("q", 5),)),
        False,
    ),
    "rank-stabilised fused layers": ("gpt_neox", "as released", dict(scaling="alpha/sqrt(rank)"), True),
    "a shared expert of other rank": ("qwen2_moe", "as released", dict(rank_pattern=((SHARED, 5),)), True),
    "dora of a shared expert": (
        "qwen2_moe",
        "as released",
        dict(dora=True, targets=("q", SHARED, "shared_gate")),
        False,
    ),
    "dense layers and shared experts of other ranks": (
        "glm4_moe",
        "as released",
        dict(rank_pattern=(("layers/dense/mlp/*", 5), (SHARED, 2)), alpha_pattern=((SHARED, 7.0),)),
        True,
    ),
    "experts of other ranks": (
        "qwen3_moe",
        "renormalised",
        dict(rank_pattern=(("layers/mlp/*", 2),), scaling="alpha/sqrt(rank)"),
        True,
    ),
}


@pytest.mark.parametrize(("model_type", "name", "changes", "norms"), VARIANTS.values(), ids=VARIANTS)
def test_peft_computes_the_variants_too(model_type, name, changes, norms, tmp_path):
    reference_model(config_json(model_type, name), tmp_path / "base")
    base = load_model(tmp_path / "base")
    method = LoRA(rank=3, alpha=4.5, norms=norms)
    lora = LoRAConfig(**(dict(rank=3, alpha=4.5) | changes))
    method = dataclasses.replace(
        method, **{field: dict(value) if field.endswith("_pattern") else value for field, value in changes.items()}
    )
    assert method.lora_config() == lora
    model, generator = base.adapted(method, 0), np.random.default_rng(1)
    flat = flatten(model.weights)
    paths = [path for path in flat if method.trains(path)]
    for path in paths:
        flat[path] = np.asarray(flat[path]) + generator.normal(0, 0.1, flat[path].shape).astype(np.float32)
    model = model.overlaid({path: flat[path] for path in paths})
    saved(model, paths, tmp_path / "adapter", tmp_path / "base")
    expected = ours(model.config, model.weights, model.lora)
    np.testing.assert_allclose(theirs(tmp_path / "base", tmp_path / "adapter"), expected, atol=1e-4)
    assert np.abs(expected - theirs(tmp_path / "base")).max() > 0.1

    again = load_adapter(tmp_path / "adapter", base.config, base.hf_config)
    np.testing.assert_allclose(
        ours(base.config, again.over(base.config, base.weights), again.lora), expected, atol=1e-4
    )
    assert again.lora is not None
    if model_type in ("llama", "qwen2", "qwen2_moe"):
        adapted = [path for path in PATHS if f"{path}/lora_a" in flat]
        assert [again.lora.adapter(path) for path in adapted] == [lora.adapter(path) for path in adapted]


@pytest.mark.parametrize("name", ["tied, odd head dimension", "untied, no grouping, biases"])
def test_rows_alone_take_their_own_bytes_and_no_table(tmp_path, name):
    reference_model(config_json("llama", name), tmp_path / "base")
    model, paths = trained(load_model(tmp_path / "base", 64 - NEW_ROWS), None)
    held = saved(model, paths, tmp_path / "adapter", tmp_path / "base")
    assert held == dict.fromkeys(("embed_tokens", "lm_head")[: len(paths)], "rows")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == len(paths) * NEW_ROWS * model.config.hidden_size * 4
    expected = ours(model.config, model.weights)
    np.testing.assert_allclose(theirs(tmp_path / "base", tmp_path / "adapter"), expected, atol=1e-4)
    again = load_adapter(tmp_path / "adapter", model.config, model.hf_config)
    assert again.lora is None
    assert again.base_rows(64) == 64 - NEW_ROWS


def test_factors_alone_carry_no_table(tmp_path):
    reference_model(config_json("llama", "linear"), tmp_path / "base")
    model, paths = trained(load_model(tmp_path / "base", 60), LoRAConfig(rank=2, alpha=4.0, targets=("q",)), ())
    assert saved(model, paths, tmp_path / "adapter", tmp_path / "base") == {}
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert sum(tensor.nbytes for tensor in load_file(file).values()) == 3 * 4 * (32 * 2 + 2 * 32)
    assert file.stat().st_size < 5000
    assert load_adapter(tmp_path / "adapter", model.config, model.hf_config).rows == {}


@pytest.mark.parametrize(
    ("model_type", "name", "row_multiple"),
    [("llama", "tied, odd head dimension", 16), ("llama", "linear", 1), ("gpt_neox", "as released", 16)],
)
def test_all_rows_go_along_whole(tmp_path, model_type, name, row_multiple):
    reference_model(config_json(model_type, name), tmp_path / "base")
    base = load_model(tmp_path / "base", 64 - NEW_ROWS).padded(row_multiple)
    tables = ("embed/base", "embed/new", "head/base", "head/new")
    model, paths = trained(base, LoRAConfig(rank=2, alpha=2.0), tables)
    assert set(saved(model, paths, tmp_path / "adapter", tmp_path / "base").values()) == {"whole"}
    expected = ours(model.config, model.weights, model.lora)
    np.testing.assert_allclose(theirs(tmp_path / "base", tmp_path / "adapter"), expected, atol=1e-4)
    again = load_adapter(tmp_path / "adapter", model.config, model.hf_config)
    assert again.base_rows(64) is None
    after = flatten(again.over(base.config, base.weights))
    for path in paths:
        count = base.config.table_rows.get(path.split("/")[1])
        np.testing.assert_array_equal(after[path][:count], flatten(model.weights)[path][:count], err_msg=path)


def test_what_an_adapter_cannot_hold_is_refused(tmp_path):
    reference_model(config_json("llama", "linear"), tmp_path / "base")
    model, paths = trained(load_model(tmp_path / "base"), LoRAConfig(rank=2, alpha=4.0))
    with pytest.raises(UserError, match=r"cannot hold 2 .* 'final_norm/scale' first: export the whole model"):
        saved(model, [*paths, "layers/mlp/up/kernel", "final_norm/scale"], tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(UserError, match="nothing was trained"):
        saved(dataclasses.replace(model, lora=None), [], tmp_path / "adapter", tmp_path / "base")
    assert not (tmp_path / "adapter").exists()


def test_the_tokenizer_goes_along(tmp_path):
    from inputs import english, write_tokenizer
    from transformers import AutoTokenizer

    reference_model(config_json("llama", "linear"), tmp_path / "base")
    write_tokenizer(tmp_path / "tokenizer", english(50))
    model, paths = trained(load_model(tmp_path / "base"), LoRAConfig(rank=2, alpha=4.0))
    saved(model, paths, tmp_path / "a", tmp_path / "base", tokenizer_directory=tmp_path / "tokenizer")
    assert AutoTokenizer.from_pretrained(tmp_path / "a")("the city")["input_ids"]


@pytest.mark.parametrize(
    ("base", "name", "revision"), [("org/name@v1", "org/name", "v1"), ("org/name", "org/name", None)]
)
def test_a_base_on_the_hub_keeps_its_revision(tmp_path, base, name, revision):
    import peft

    reference_model(config_json("llama", "linear"), tmp_path / "base")
    model, paths = trained(load_model(tmp_path / "base"), LoRAConfig(rank=2, alpha=4.0))
    saved(model, paths, tmp_path / "adapter", base)
    found = peft.LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (found.base_model_name_or_path, found.revision) == (name, revision)
    assert read_peft_config(tmp_path / "adapter").base == base


def test_a_directory_is_a_base_whatever_its_name(tmp_path):
    reference_model(config_json("llama", "linear"), tmp_path / "base@v1")
    model, paths = trained(load_model(tmp_path / "base@v1"), LoRAConfig(rank=2, alpha=4.0))
    saved(model, paths, tmp_path / "adapter", tmp_path / "base@v1")
    assert read_peft_config(tmp_path / "adapter").base == str(tmp_path / "base@v1")
