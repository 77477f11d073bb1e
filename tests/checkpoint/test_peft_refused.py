"""Every way in which an adapter's directory can be wrong is told."""

import shutil

import numpy as np
import pytest
from contracts.family_configs import config_json
from contracts.test_families import reference_model
from peft_models import QUERIES, ROWS, edit, edit_tensors, train_with_peft

from cpt_jax.checkpoint.peft import load_adapter
from cpt_jax.core.errors import UserError
from cpt_jax.recipe.model import load_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def by_peft(tmp_path_factory):
    """(a base, an adapter with rows that PEFT trained on it)."""
    root = tmp_path_factory.mktemp("peft")
    reference_model(config_json("qwen2", "tied"), root / "base")
    train_with_peft(root / "adapter", root / "base", dict(target_modules=QUERIES, trainable_token_indices=ROWS))
    return load_model(root / "base"), root / "adapter"


QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WRONG = {
    "no configuration": (lambda d: (d / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "configuration cut": (lambda d: (d / "adapter_config.json").write_text('{"r": '), "no LoRA configuration"),
    "no rank": (lambda d: edit(d, r=None), "no LoRA configuration"),
    "rank": (lambda d: edit(d, r=0), "r=0: a rank is at least 1"),
    "alpha": (lambda d: edit(d, lora_alpha=0), "lora_alpha=0: alpha is greater than 0"),
    "pattern": (lambda d: edit(d, target_modules="(q_proj"), "no LoRA configuration"),
    "kind": (lambda d: edit(d, peft_type="LOHA"), "peft_type='LOHA', .*merge_and_unload"),
    "DoRA without magnitudes": (lambda d: edit(d, use_dora=True), "lacks the tensor '.*lora_magnitude_vector'"),
    "DoRA in some layers": (lambda d: edit(d, use_dora=True, layers_to_transform=[1]), "use_dora=true in some layers"),
    "bias": (lambda d: edit(d, bias="lora_only"), "bias='lora_only'"),
    "transposed": (lambda d: edit(d, fan_in_fan_out=True), "fan_in_fan_out=True"),
    "pissa": (
        lambda d: edit(d, init_lora_weights="pissa_niter_4"),
        "init_lora_weights='pissa_niter_4', .*path_initial_model_for_weight_conversion",
    ),
    "loftq": (lambda d: edit(d, init_lora_weights="loftq"), "init_lora_weights='loftq'"),
    "field of tomorrow": (lambda d: edit(d, use_new_variant=True), "use_new_variant=True, which is not supported"),
    "replicated layers": (lambda d: edit(d, layer_replication=[[0, 2]]), "layer_replication"),
    "norms missing": (lambda d: edit(d, modules_to_save=["norm"]), "lacks the tensor '.*model.norm.weight'"),
    "whole linears": (
        lambda d: edit(d, modules_to_save=["up_proj"]),
        "modules_to_save with 'up_proj'; only model.embed",
    ),
    "targets of another": (
        lambda d: (edit(d, target_modules=["c_attn"], trainable_token_indices=None), edit_tensors(d, dict.clear)),
        "'c_attn'.*which this base does not have",
    ),
    "ids": (lambda d: edit(d, trainable_token_indices={"embed_tokens": [1, 99]}), "distinct ids below 64"),
    "ids twice": (lambda d: edit(d, trainable_token_indices={"embed_tokens": [1, 1]}), "distinct ids below 64"),
    "pickle": (
        lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
        r"pickle only \(adapter_model.bin\), which can run code",
    ),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "weights cut": (
        lambda d: (d / "adapter_model.safetensors").write_bytes((d / "adapter_model.safetensors").read_bytes()[:-9]),
        "truncated or corrupt",
    ),
    "tensor missing": (lambda d: edit_tensors(d, lambda t: t.pop(QUERY)), f"lacks the tensor '{QUERY}'"),
    "rows missing": (
        lambda d: edit_tensors(d, lambda t: [t.pop(name) for name in list(t) if "token_adapter" in name]),
        "lacks the tensor '.*trainable_tokens_delta'",
    ),
    "tensor too many": (
        lambda d: edit_tensors(d, lambda t: t.update({"base_model.model.score.weight": np.zeros(2, np.float32)})),
        "holds a tensor 'base_model.model.score.weight' that is no LoRA factor",
    ),
    "head adapted": (
        lambda d: edit_tensors(d, lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[QUERY]})),
        "'base_model.model.lm_head.lora_A.weight'",
    ),
    "shape": (lambda d: edit(d, r=3), r"q_proj.lora_A.weight has shape \[4, 32\], .* ask for \[3, 32\]"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_wrong_adapters_are_refused(by_peft, tmp_path, spoil, message):
    base, adapter = by_peft
    shutil.copytree(adapter, tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    with pytest.raises(UserError, match=message) as error:
        load_adapter(tmp_path / "adapter", base.config, base.hf_config)
    assert "\n" not in str(error.value)


UNTIED = {
    "embedding alone": dict(modules_to_save=["embed_tokens"]),
    "head alone": dict(modules_to_save=["lm_head"]),
    "other rows": dict(trainable_token_indices={"embed_tokens": ROWS, "lm_head": [3]}),
    "rows of the head": dict(trainable_token_indices={"lm_head": [3]}),
}


@pytest.mark.parametrize("settings", UNTIED.values(), ids=UNTIED)
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.")
def test_an_adapter_that_unties_the_head_is_refused(by_peft, tmp_path, settings):
    base, adapter = by_peft
    train_with_peft(tmp_path / "adapter", adapter.parent / "base", dict(target_modules=QUERIES) | settings)
    with pytest.raises(UserError, match=r"head that is not its embedding.*ensure_weight_tying=True"):
        load_adapter(tmp_path / "adapter", base.config, base.hf_config)
