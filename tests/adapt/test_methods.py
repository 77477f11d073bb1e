"""What trains: attaching changes nothing, merging changes nothing, and each method trains what it says."""

import dataclasses

import jax
import numpy as np
import pytest
from contracts.family_configs import config_json
from contracts.test_families import reference_model
from inputs import tiny_config
from method_inputs import ANYWHERE, CONFIGS, DENSE, TOKENS, forward, model_of, trained

from cpt_jax.adapt import ByPath, Embeddings, Expand, Full, LoRA, Method, expanded_hf_config
from cpt_jax.checkpoint.hf_write import save
from cpt_jax.core.config import from_json, override, to_json
from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import flatten
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.models.families import family_for
from cpt_jax.recipe.model import load_model

CASES = [
    pytest.param(config, method, id=f"{first}: {second}")
    for first, config in CONFIGS.items()
    for second, method in (ANYWHERE if config.experts else ANYWHERE | DENSE).items()
]


@pytest.mark.parametrize(("config", "method"), CASES)
def test_attaching_changes_no_logit_and_merging_none(config, method):
    base = model_of(config)
    adapted = base.adapted(method, seed=3)
    assert flatten(adapted.network.shapes).keys() == flatten(adapted.weights).keys()
    # DoRA multiplies by a 1; XLA fuses that, and may add up what follows in another order.
    with jax.disable_jit(getattr(method, "dora", False)):
        np.testing.assert_array_equal(forward(adapted), forward(base))

    moved = trained(adapted, method)
    merged = moved.merged()
    assert flatten(abstract_decoder(merged.config).shapes).keys() == flatten(merged.weights).keys()
    found = forward(moved)
    assert np.abs(found - forward(base)).max() > 0.01
    np.testing.assert_allclose(forward(merged), found, atol=1e-4)


WRONG = {
    "target": (lambda: LoRA(targets=("w1",)), "'w1' matches no weight; there are: layers/attention/q"),
    "pattern of ranks": (lambda: LoRA(rank_pattern={"layers/ffn/*": 3}), "'layers/ffn/\\*' matches no weight"),
    "pattern of alphas": (lambda: LoRA(alpha_pattern={"w1": 3.0}), "'w1' matches no weight"),
    "rank": (lambda: LoRA(rank_pattern={"q": 0}), "LoRA rank is 0"),
    "dropout": (lambda: LoRA(dropout=1.0), "dropout is 1.0"),
    "layers": (lambda: ByPath(patterns=("layers/*",), layers=(2, 2)), r"layers is \[2, 2\]"),
    "blocks": (lambda: Expand(blocks=0), "blocks is 0"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


ABSENT = {
    "path": ("llama", ByPath(patterns=("layers/ffn/*",)), "'layers/ffn/\\*' matches no weight; there are: embed/base"),
    "layer": ("llama", ByPath(patterns=("layers/*",), layers=(1, 3)), r"\[1, 3\], but the model has 2"),
    "layers of nothing": ("llama", ByPath(patterns=("embed/*",), layers=(0, 1)), "no pattern matches a weight of the"),
    "more than there are": ("llama", Expand(blocks=3), "the model has 2 layers"),
    "tied": ("llama", Embeddings(tables="output"), "head is its embedding"),
    "tied input": ("llama", Embeddings(tables="input"), "head is its embedding"),
    "dora of experts": ("experts", LoRA(dora=True), "LoRA on experts has no dora"),
    "dropout of experts": ("experts", LoRA(dropout=0.1), "LoRA on experts has no dropout"),
}


@pytest.mark.parametrize(("config", "method", "message"), ABSENT.values(), ids=ABSENT)
def test_what_the_model_does_not_have_is_refused(config, method, message):
    with pytest.raises(UserError, match=message):
        model_of(CONFIGS[config]).adapted(method, 0)


def test_a_model_without_the_targets_is_told_which_there_are():
    ungated = tiny_config(gated=False)
    assert LoRA().layout(ungated) == ungated
    with pytest.raises(UserError, match=r"LoRA targets gate are not in this model; there are: .*layers/mlp/up"):
        LoRA(targets=("gate",)).layout(ungated)


def test_each_method_trains_what_it_says():
    config = tiny_config(new_rows=6, tie_word_embeddings=False, qkv_bias=True)

    def paths(method):
        return {path for path in flatten(model_of(config).adapted(method, 0).weights) if method.trains(path)}

    assert paths(Embeddings(tables="input")) == {"embed/new"}
    assert paths(Embeddings(tables="output", rows="all")) == {"head/base", "head/new"}
    assert paths(Embeddings()) == {"embed/new", "head/new"}
    factors = {f"layers/attention/q/{leaf}" for leaf in ("lora_a", "lora_b")}
    assert paths(LoRA(targets=("q",))) == factors | {"embed/new", "head/new"}
    norms = {"layers/attention_norm/scale", "layers/mlp_norm/scale", "final_norm/scale"}
    adapters = {f"layers/attention/q/{leaf}" for leaf in ("lora_a", "lora_b", "magnitude")}
    assert paths(LoRA(targets=("q",), dora=True, norms=True, new_rows=False)) == adapters | norms
    assert paths(ByPath(patterns=("layers/*/q/*",), layers=(0, 1))) == {
        "layers/chosen/attention/q/kernel",
        "layers/chosen/attention/q/bias",
    }
    chosen = ByPath(patterns=("layers/*",), layers=(1, 3)).layout(tiny_config(num_layers=4))
    assert chosen.layer_groups == (("before", 1), ("chosen", 2), ("after", 1))
    added = paths(Expand(blocks=2, new_rows=False))
    assert paths(Expand(blocks=2)) == added | {"embed/new", "head/new"}
    assert {path.split("/")[1] for path in added} == {"added_0", "added_1"}
    assert len(added) == 2 * sum(path.startswith("layers/") for path in flatten(abstract_decoder(config).shapes))


def test_constants_of_layers_never_train():
    model = model_of(tiny_config(num_layers=4, layer_scalar=True))
    for method in (Full(), ByPath(patterns=("layers/*",)), Expand(blocks=2), LoRA(norms=True)):
        paths = [path for path in flatten(model.adapted(method, 0).weights) if path.endswith("layer_scalar")]
        assert paths
        assert not any(map(method.trains, paths))


def test_of_an_activation_that_learns_two_numbers_train():
    model = model_of(tiny_config(num_layers=4, gated=False, activation="xielu"))
    alphas = {"alpha_p", "alpha_n"}
    for method, expected in (
        (Full(), alphas),
        (ByPath(patterns=("layers/mlp/xielu/*",), layers=(1, 3)), alphas),
        (Expand(blocks=2), alphas),
        (LoRA(norms=True), set()),
    ):
        paths = [path for path in flatten(model.adapted(method, 0).weights) if "/xielu/" in path]
        assert {path.rpartition("/")[2] for path in paths} == alphas | {"beta", "eps"}
        assert {path.rpartition("/")[2] for path in paths if method.trains(path)} == expected


def test_a_deeper_model_s_config_says_what_each_layer_is_or_is_refused():
    def grown(model_type, name, **changes):
        given = config_json(model_type, name) | changes
        layout = Expand(blocks=2).layout(family_for(given).config_from_hf(given))
        return expanded_hf_config(given, layout)

    full, sliding = "full_attention", "sliding_attention"
    assert grown("qwen3", "tied, head dimension", layer_types=[full] * 3)["layer_types"] == [full] * 5
    assert grown("qwen2", "untied, window above")["layer_types"] == [full] * 2 + [sliding] * 3
    # A fourth layer would have a window.
    with pytest.raises(UserError, match=r"config\.json of qwen2 cannot describe the deeper model"):
        grown("qwen2", "untied, window above", max_window_layers=3)


def test_methods_come_back_from_json():
    for method in (*ANYWHERE.values(), *DENSE.values(), Embeddings(rows="all", tables="input")):
        assert from_json(Method, to_json(method)) == method

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Holder:
        method: Method

    holder = override(Holder(method=LoRA(rank_pattern={"q": 2})), ("method.rank_pattern.q", "5"))
    assert holder.method == LoRA(rank_pattern={"q": 5})
    with pytest.raises(UserError, match="alpha/rank"):
        from_json(Method, to_json(LoRA()) | {"scaling": "alpha"})


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "tied, odd head dimension"),
        ("gemma2", "as released"),
        ("olmo2", "untied"),
        ("phi3", "window"),
        ("apertus", "as released"),
        ("hunyuan_v1_moe", "as released"),
        ("gpt_oss", "as released"),
        ("smollm3", "by interval, biases, yarn"),
        ("qwen3_5_text", "not periodic, one value head a key head"),
        ("qwen3_next", "not periodic, one value head a key head, not renormalised"),
        ("granitemoehybrid", "without experts, not periodic, groups, steps within limits"),
        ("nemotron_h", "as released"),
        ("nemotron_h", "experts and feed-forwards, groups, biases"),
        ("lfm2", "untied, biases, not periodic"),
        ("lfm3", "untied, biases, not periodic"),
        ("lfm2_moe", "untied, biases of convolutions, not renormalised"),
        ("gemma4_text", "as transformers writes it"),
        ("minicpm3", "as released"),
        ("deepseek_v3", "as released"),
        ("glm4_moe_lite", "groups, two dense, biases"),
        ("ernie4_5_moe", "as released"),
        ("minimax_m2", "as released"),
        ("dots1", "windows, groups, biases"),
        ("exaone_moe", "by number, groups"),
        ("glm4_moe", "groups, norms of heads, two dense"),
    ],
)
def test_an_expanded_model_is_one_that_transformers_runs(model_type, name, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    reference = reference_model(config_json(model_type, name), tmp_path / "base")
    base, method = load_model(tmp_path / "base"), Expand(blocks=2)
    adapted = base.adapted(method, 0)
    assert adapted.config.num_layers == base.config.num_layers + 2
    with torch.no_grad():
        unchanged = reference(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(forward(adapted), unchanged, atol=1e-4)

    moved = trained(adapted, method)
    merged = moved.merged()
    save(tmp_path / "deeper", merged.config, merged.weights, merged.hf_config, tmp_path / "base")
    again = load_model(tmp_path / "deeper")
    assert again.config == merged.config
    deeper = AutoModelForCausalLM.from_pretrained(tmp_path / "deeper", attn_implementation="eager")
    with torch.no_grad():
        np.testing.assert_allclose(deeper(torch.tensor(TOKENS)).logits.numpy(), forward(moved), atol=1e-4)
    kinds = base.config.kind_of_layer
    assert again.config.kind_of_layer == tuple(kinds[layer] for layer, _ in method.order(len(kinds)))
    with pytest.raises(UserError, match="as many layers"):
        moved.interpolated(base, 0.5)
