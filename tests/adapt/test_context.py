"""A longer context is in config.json, as transformers reads it, and in nothing else."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest
from contracts.family_configs import config_json
from contracts.test_families import reference_model
from inputs import hf_config, tiny_config

from cpt_jax.adapt import Context, Linear, Theta, Yarn
from cpt_jax.checkpoint.context import lengthen
from cpt_jax.checkpoint.gguf import import_gguf
from cpt_jax.checkpoint.gguf_write import export_gguf
from cpt_jax.checkpoint.hf import load, read_config
from cpt_jax.core.errors import UserError
from cpt_jax.models.decoder import abstract_decoder, apply, logits
from cpt_jax.models.families import family_for
from cpt_jax.models.rope import Rope

OLD, NEW = 64, 160
# Of the contract tests' configurations, those whose positions can be stretched, with the ways in which they can.
EVERY = (Yarn(), Theta(), Linear())
CASES = [
    ("llama", "untied, no grouping, biases", EVERY),
    ("qwen2", "tied", EVERY),
    ("qwen3", "untied, biases", EVERY),
    ("mistral", "no window, head dimension", EVERY),
    ("smollm3", "as released", EVERY),
    ("olmo2", "untied", EVERY),
    ("granite", "as released", EVERY),
    ("glm4", "as released", EVERY),
    ("gpt_neox", "as released", EVERY),
    ("gemma3_text", "as released", EVERY),
    ("deepseek_v3", "dense, halves rotated", EVERY),
    # Of whose class transformers allows LongRoPE alone.
    ("phi3", "partial, tied", (Theta(),)),
]
EACH = [pytest.param(kind, name, rope, id=f"{kind}, {name}, {rope}") for kind, name, ropes in CASES for rope in ropes]


def config_of(raw: dict):
    return family_for(raw).config_from_hf(raw)


@pytest.mark.parametrize(("model_type", "name", "rope"), EACH)
def test_the_fields_of_transformers_4_and_5_say_the_same(model_type, name, rope):
    raw = config_json(model_type, name)
    longer = Context(length=NEW, rope=rope).over(raw)
    config = config_of(longer)
    assert config.context_length == NEW
    # What transformers 4 does not know, and what 5 has in its place.
    older = {field: value for field, value in longer.items() if field != "rope_parameters"}
    old = ("rope_theta", "rotary_emb_base", "rope_scaling")
    newer = {field: value for field, value in longer.items() if field not in old}
    assert config_of(older) == config == config_of(newer)
    stretched = [kind.rope for kind in config.layer_kinds if kind.window is None]
    factors = {kind.scaling.factor for kind in stretched if kind is not None and isinstance(rope, Yarn | Linear)}
    assert factors <= {NEW / config_of(raw).context_length}
    assert all(new != old.rope for new, old in zip(stretched, config_of(raw).layer_kinds, strict=False) if new)
    changed = {field for field in longer if longer[field] != raw.get(field)}
    assert changed <= {"max_position_embeddings", "rope_parameters", *old}


@pytest.mark.parametrize(
    ("model_type", "name", "rope"),
    [
        *(("llama", "tied, odd head dimension", rope) for rope in EVERY),
        ("gemma3_text", "untied, capped, nested rope", Yarn()),
        ("phi3", "partial, tied", Theta(theta=50_000.0)),
    ],
)
def test_beyond_the_old_length_logits_are_those_of_transformers(model_type, name, rope, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    plain = reference_model(config_json(model_type, name), tmp_path)
    lengthen(tmp_path, Context(length=NEW, rope=rope))
    tokens = np.random.default_rng(0).integers(3, 64, size=(1, NEW))
    longer = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        expected, before = (model(torch.tensor(tokens)).logits.numpy() for model in (longer, plain))
    config, weights, _ = load(tmp_path)
    network = abstract_decoder(config)

    @jax.jit
    def forward(weights):
        hidden = apply(network, weights, tokens, np.arange(NEW)[None], np.ones_like(tokens), compute_dtype="float32")
        return logits(network, weights, hidden, compute_dtype="float32")

    found = np.asarray(forward(jax.tree.map(np.asarray, weights)))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - before)[:, OLD:].max() > 1e-2


@pytest.mark.parametrize("rope", EVERY, ids=str)
def test_gguf_says_it_too(rope, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    lengthen(tmp_path / "model", Context(length=1024, rope=rope))
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    import_gguf(tmp_path / "model.gguf", tmp_path / "again")
    written, again = (config_of(read_config(tmp_path / name)) for name in ("model", "again"))
    assert (again.ropes, again.context_length) == (written.ropes, 1024)


@pytest.mark.parametrize(("theta", "old", "new"), [(1e4, 2048, 16384), (1e5, 8192, 16384), (5e5, 8192, 65536)])
def test_by_theta_no_pair_turns_where_it_was_not_trained(theta, old, new):
    chosen = Theta().parameters(theta, old, new)["rope_theta"]
    assert chosen == np.float32(chosen), "GGUF holds no other"
    before, after = (Rope(theta=each, dim=64).frequencies().astype(float) for each in (theta, chosen))
    slow = before * old < 2 * np.pi
    assert slow.any()
    assert np.all(after[slow] * new <= before[slow] * old * (1 + 1e-5))
    # With any smaller one, the pair that just turned once would.
    critical = np.log(old / (2 * np.pi)) / np.log(theta)
    np.testing.assert_allclose(new * chosen**-critical, 2 * np.pi, rtol=1e-4)


LLAMA = hf_config(tiny_config())
REFUSED = {
    "no longer": (LLAMA, Context(length=256), "context.length is 256, and the base reads 256 tokens: give more"),
    "a smaller theta": (
        LLAMA,
        Context(length=512, rope=Theta(theta=9e3)),
        "context.rope.theta is 9000, the base's 10000: give more",
    ),
    "stretched already": (
        config_json("llama", "one key head, llama3"),
        Context(length=512),
        "the base's positions turn by Llama3, and only plain rotary ones are stretched",
    ),
    "nothing to stretch": (
        config_json("cohere2", "as released"),
        Context(length=512),
        "no layer of this cohere2 both sees all tokens and turns by their positions",
    ),
    "not in transformers": (
        config_json("phi3", "partial, tied"),
        Context(length=512),
        "transformers' phi3 cannot be told of Yarn: give context.rope another kind",
    ),
    "theta is something else": (
        config_json("hunyuan_v1_dense", "as released"),
        Context(length=512, rope=Theta()),
        "transformers' hunyuan_v1_dense cannot be told of Theta",
    ),
}


@pytest.mark.parametrize(("raw", "context", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_told(raw, context, message, caplog):
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(UserError, match=message):
        context.over(raw)


def test_within_a_model_that_also_sees(tmp_path):
    text = {field: value for field, value in config_json("qwen2", "tied").items() if field != "model_type"}
    raw = {"model_type": "internvl", "text_config": text | {"model_type": "qwen2"}, "vision_config": {}}
    longer = Context(length=NEW).over(raw)
    assert longer.keys() == raw.keys()
    assert longer["text_config"]["max_position_embeddings"] == NEW
    assert config_of(longer).ropes == config_of(longer["text_config"]).ropes != config_of(raw).ropes


def test_a_tokenizer_says_how_long_texts_may_be(tmp_path):
    for given, expected in (({"model_max_length": 64}, NEW), ({"model_max_length": 10**30}, 10**30), ({}, None)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(given | {"other": "é"}))
        lengthen(tmp_path, Context(length=NEW))
        found = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert (found.get("model_max_length"), found["other"]) == (expected, "é")
    assert dataclasses.asdict(Context(length=NEW)) == {"length": NEW, "rope": {}}
