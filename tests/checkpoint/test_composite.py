"""Models that see as well as read: what they say of text, what training leaves alone, and their files."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cpt_jax.adapt import LoRA
from cpt_jax.checkpoint.base import resolve_base
from cpt_jax.checkpoint.hf import load
from cpt_jax.checkpoint.hf_write import save
from cpt_jax.checkpoint.peft import save_adapter
from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import flatten, unflatten
from cpt_jax.models.decoder import abstract_decoder, apply, logits
from cpt_jax.models.families import family_for
from cpt_jax.models.families.composite import PREFIXES
from cpt_jax.models.vocab_table import TABLES
from cpt_jax.recipe.model import load_model

ROWS = 64
TEXT = dict(
    vocab_size=ROWS,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
ROTATION = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])
QWEN_3_5 = dict(rope_parameters=ROTATION | dict(partial_rotary_factor=0.5), full_attention_interval=2)
QWEN_3_5 |= dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40)
SIGHT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
SIGHT |= dict(image_size=28, patch_size=14)
QWEN_SIGHT = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32)
PIXTRAL = SIGHT | dict(model_type="pixtral", head_dim=8)
CLIP = SIGHT | dict(model_type="clip_vision_model")
GEMMA_4 = TEXT | dict(global_head_dim=16, num_global_key_value_heads=1, attention_k_eq_v=True, sliding_window=6)
GEMMA_4 |= dict(final_logit_softcapping=4.0, use_bidirectional_attention="vision")
GEMMA_4_SIGHT = SIGHT | dict(head_dim=8, num_key_value_heads=2, patch_size=14, position_embedding_size=8)
MISTRAL_4 = dict(num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=4, qk_rope_head_dim=4)
MISTRAL_4 |= dict(v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
GROWING = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.5)
MISTRAL_4 |= dict(model_type="mistral4", rope_parameters=GROWING | dict(rope_theta=1e4))
# model_type -> its config.json.
CONFIGS = {
    "gemma3": dict(text_config=TEXT, vision_config=SIGHT, mm_tokens_per_image=4, image_token_index=3),
    "gemma4": dict(
        # As E2B: of four layers the last two have no keys and values.
        text_config=GEMMA_4
        | dict(hidden_size_per_layer_input=4, vocab_size_per_layer_input=ROWS, num_hidden_layers=4)
        | dict(layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2),
        vision_config=GEMMA_4_SIGHT,
        image_token_id=3,
    ),
    "gemma4_unified": dict(
        text_config=GEMMA_4,
        vision_config=dict(patch_size=4, mm_embed_dim=16, mm_posemb_size=8, output_proj_dims=16),
        image_token_id=3,
    ),
    "idefics3": dict(text_config=TEXT | dict(model_type="llama"), vision_config=SIGHT, image_token_id=3),
    "internvl": dict(
        text_config=TEXT | dict(model_type="qwen3"),
        vision_config=SIGHT | dict(image_size=[28, 28], patch_size=[14, 14]),
        image_token_id=3,
        tie_word_embeddings=False,
    ),
    "llava": dict(text_config=TEXT | dict(model_type="llama"), vision_config=CLIP, image_token_index=3),
    "llava_next": dict(text_config=TEXT | dict(model_type="mistral"), vision_config=CLIP, image_token_index=3),
    "mistral3": dict(text_config=TEXT | dict(model_type="ministral3"), vision_config=PIXTRAL, image_token_index=3),
    "mistral3, as Small 4": dict(
        text_config={name: value for name, value in TEXT.items() if name != "head_dim"} | MISTRAL_4,
        vision_config=PIXTRAL,
        image_token_index=3,
    ),
    "qwen2_vl": dict(text_config=TEXT | dict(rope_parameters=ROTATION), vision_config=QWEN_SIGHT | dict(embed_dim=16)),
    "qwen2_5_vl": dict(
        text_config=TEXT | dict(rope_parameters=ROTATION), vision_config=QWEN_SIGHT, tie_word_embeddings=True
    ),
    "qwen3_vl": dict(
        text_config=TEXT | dict(rope_parameters=ROTATION),
        vision_config=QWEN_SIGHT | dict(deepstack_visual_indexes=[0]),
    ),
    "qwen3_5": dict(
        text_config=TEXT | QWEN_3_5,
        vision_config=QWEN_SIGHT | dict(num_position_embeddings=16),
        image_token_id=3,
        tie_word_embeddings=True,
    ),
    "qwen3_5_moe": dict(
        text_config=TEXT | QWEN_3_5 | EXPERTS,
        vision_config=QWEN_SIGHT | dict(num_position_embeddings=16),
        image_token_id=3,
    ),
    "smolvlm": dict(text_config=TEXT | dict(model_type="llama"), vision_config=SIGHT, image_token_id=3),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of a model_type, transformers' model and the directory that it saves."""
    made = {}

    def model(name: str):
        if name not in made:
            import torch
            from transformers import AutoConfig, AutoModelForImageTextToText

            torch.manual_seed(0)
            config = AutoConfig.for_model(name.partition(",")[0], **json.loads(json.dumps(CONFIGS[name])))
            found = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float().eval()
            with torch.no_grad():
                for parameter in found.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape))
            directory = tmp_path_factory.mktemp("model")
            found.save_pretrained(directory)
            raw = json.loads((directory / "config.json").read_text())
            (directory / "config.json").write_text(
                json.dumps(raw | {"text_config": raw["text_config"] | {"torch_dtype": "bfloat16"}})
            )
            (directory / "preprocessor_config.json").write_text('{"size": 28}')
            made[name] = found, directory
        return made[name]

    return model


def ours_on(tokens: np.ndarray, directory) -> np.ndarray:
    config, leaves, _ = load(directory)
    weights, network = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), leaves), abstract_decoder(config)
    inputs = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def forward(weights):
        hidden = apply(network, weights, inputs, positions, jnp.ones_like(inputs), compute_dtype="float32")
        return logits(network, weights, hidden, compute_dtype="float32")

    return np.asarray(forward(weights))


def theirs_on(tokens: np.ndarray, model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def test_every_composite_is_compared():
    assert {name.partition(",")[0] for name in CONFIGS} == PREFIXES.keys()


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_grown_text_model_goes_back_among_what_it_was_in(model_type, models, tmp_path):
    """Logits of text are transformers' before and after; what is not the text model's is the same, bit for bit."""
    from transformers import AutoModelForImageTextToText

    reference, directory = models(model_type)
    tokens = np.random.default_rng(0).integers(4, ROWS, (2, 24), dtype=np.int32)
    expected = theirs_on(tokens, reference)
    np.testing.assert_allclose(ours_on(tokens, directory), expected, atol=1e-4)

    config, weights, raw = load(directory)
    flat = flatten(weights)
    tables = {
        f"{name}/new": np.ones((5, flat[f"{name}/base"].shape[1]), np.float32)
        for name in TABLES
        if f"{name}/base" in flat
    }
    grown = dataclasses.replace(config, new_rows=5)
    save(tmp_path / "out", grown, unflatten(flat | tables), raw, directory, origin=directory, shard_bytes=20_000)
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == {"size": 28}

    loading: Any = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    again, told = loading
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    assert again.config.get_text_config().vocab_size == ROWS + 5
    assert again.dtype == again.get_input_embeddings().weight.dtype == reference.dtype
    np.testing.assert_array_equal(theirs_on(tokens, again)[..., :ROWS], expected)
    np.testing.assert_allclose(ours_on(tokens, tmp_path / "out"), theirs_on(tokens, again), atol=1e-4)

    before, after = (
        {name: value for file in each.glob("*.safetensors") for name, value in load_file(file).items()}
        for each in (directory, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name][: len(value)] if value.ndim else after[name], value, err_msg=name)


def test_files_may_name_the_text_model_otherwise(models, tmp_path):
    """As transformers did between: what is written is named as what was read."""
    _, directory = models("gemma3")
    renamed = {
        "model." + name.replace("language_model.model.", "language_model."): value
        for name, value in load_file(directory / "model.safetensors").items()
    }
    (tmp_path / "in").mkdir()
    save_file(renamed, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text((directory / "config.json").read_text())
    tokens = np.arange(4, 20, dtype=np.int32)[None]
    np.testing.assert_array_equal(ours_on(tokens, tmp_path / "in"), ours_on(tokens, directory))
    save(tmp_path / "out", *load(tmp_path / "in"), directory, origin=tmp_path / "in")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == renamed.keys()


def test_experts_may_lie_in_stacks(models, tmp_path):
    """As in Qwen3.5's files, beside what predicts several tokens: what is written is what was read."""
    from transformers import AutoModelForImageTextToText

    reference, directory = models("qwen3_5_moe")
    one_by_one = load_file(directory / "model.safetensors")
    held = {name: value for name, value in one_by_one.items() if ".mlp.experts." not in name}
    for layer in range(2):
        prefix = f"model.language_model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([one_by_one[f"{prefix}.{expert}.{name}_proj.weight"] for expert in range(4)])
            for name in ("gate", "up", "down")
        )
        held |= {f"{prefix}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{prefix}.down_proj": down}
    held["mtp.fc.weight"] = np.ones((32, 64), np.float16)
    (tmp_path / "in").mkdir()
    save_file(held, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text((directory / "config.json").read_text())

    config, weights, raw = load(tmp_path / "in")
    expected = flatten(load(directory)[1])
    for path, leaf in flatten(weights).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected[path]), err_msg=path)
    part = (1, 2, slice(3, 20), slice(5, 9))
    for name in ("gate", "up", "down"):
        path = f"layers/mlp/{name}/kernel"
        np.testing.assert_array_equal(flatten(weights)[path][part], np.asarray(expected[path])[part])

    save(tmp_path / "out", config, weights, raw, directory, origin=tmp_path / "in", shard_bytes=20_000)
    written = {
        name: value for file in (tmp_path / "out").glob("*.safetensors") for name, value in load_file(file).items()
    }
    assert written.keys() == held.keys()
    for name, value in held.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name, strict=True)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", attn_implementation="eager")
    tokens = np.arange(4, 20, dtype=np.int32)[None]
    np.testing.assert_allclose(theirs_on(tokens, again), theirs_on(tokens, reference), atol=1e-6)


def test_what_its_makers_left_to_defaults_is_filled_in(models, tmp_path):
    """Gemma 3's config.json has neither the vocabulary's size nor the heads'; Qwen2.5-VL's had no text_config."""
    text = dict(model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34)
    config = family_for({"model_type": "gemma3", "text_config": text}).config_from_hf(
        {"model_type": "gemma3", "text_config": text}
    )
    assert (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim) == (262_208, 8, 4, 256)

    flat = {"model_type": "qwen2_5_vl", "vision_config": QWEN_SIGHT, "tie_word_embeddings": True}
    flat |= TEXT | dict(rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]}, rope_theta=1e4)
    del flat["head_dim"]
    _, directory = models("qwen2_5_vl")
    (tmp_path / "config.json").write_text(json.dumps(flat))
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    config, weights, raw = load(tmp_path)
    save(tmp_path / "out", config, weights, raw, directory, origin=tmp_path)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == flat | {"dtype": "float32"}


LAYER = "model.language_model.layers.1.mlp"
ADAPTED = {
    "qwen3_vl": dict(target_modules=[f"{LAYER}.up_proj"]),
    "qwen3_5_moe": dict(target_modules=[], target_parameters=[f"{LAYER}.experts.gate_up_proj"]),
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(("model_type", "targets"), ADAPTED.items(), ids=ADAPTED)
def test_an_adapter_is_merged_into_the_text_model(model_type, targets, models, tmp_path):
    from peft import LoraConfig, get_peft_model

    reference, directory = models(model_type)
    adapted = get_peft_model(reference, LoraConfig(r=2, init_lora_weights=False, **targets))
    tokens = np.arange(4, 20, dtype=np.int32)[None]
    expected = theirs_on(tokens, adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.unload()
    assert np.abs(expected - theirs_on(tokens, reference)).max() > 1e-2

    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(directory)})
    )
    merged = resolve_base(str(tmp_path / "adapter"), tmp_path / "merged")
    np.testing.assert_allclose(ours_on(tokens, merged), expected, atol=1e-4)
    sight = "model.visual.patch_embed.proj.weight"
    before, after = (load_file(each / "model.safetensors")[sight] for each in (directory, merged))
    np.testing.assert_array_equal(before, after)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_leaves_what_sees_alone(models, tmp_path):
    """Vision towers have layers of the same names; PEFT warns, which is an error here, of any that the file lacks."""
    from peft import PeftModel

    reference, directory = models("gemma3")
    method = LoRA(rank=2, alpha=2.0, targets=("q", "up"))
    model = load_model(directory).adapted(method, seed=0)
    trained = [path for path in flatten(model.weights) if method.trains(path)]
    save_adapter(
        tmp_path, model.config, model.weights, model.hf_config, model.lora, base=str(directory), trained=trained
    )
    adapted = PeftModel.from_pretrained(reference, tmp_path)
    try:
        names = {
            name.partition(".self_attn")[0].partition(".mlp")[0]
            for name, _ in adapted.named_parameters()
            if "lora_A" in name
        }
        assert names == {f"base_model.model.model.language_model.layers.{layer}" for layer in range(2)}
    finally:
        adapted.unload()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_of_experts_is_one_to_peft(models, tmp_path):
    from peft import PeftModel

    reference, directory = models("qwen3_5_moe")
    method = LoRA(rank=2, alpha=2.0, targets=("layers/mlp/down",))
    model = load_model(directory).adapted(method, seed=0)
    trained = [path for path in flatten(model.weights) if method.trains(path)]
    save_adapter(
        tmp_path, model.config, model.weights, model.hf_config, model.lora, base=str(directory), trained=trained
    )
    adapted = PeftModel.from_pretrained(reference, tmp_path)
    try:
        names = {name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
        assert names == {f"base_model.model.model.language_model.layers.{layer}.mlp.experts" for layer in range(2)}
    finally:
        adapted.unload()


def test_norms_of_a_text_model_go_into_no_adapter(models, tmp_path):
    """PEFT asks for them by the ends of their names, which norms of a vision tower may have too."""
    _, directory = models("gemma3")
    method = LoRA(rank=2, alpha=2.0, norms=True)
    model = load_model(directory).adapted(method, seed=0)
    trained = [path for path in flatten(model.weights) if method.trains(path)]
    with pytest.raises(UserError, match="an adapter cannot hold"):
        save_adapter(tmp_path, model.config, model.weights, model.hf_config, model.lora, base="", trained=trained)


def test_an_unknown_text_model_is_refused():
    with pytest.raises(UserError, match="the text model of this llava, bloom, is not supported"):
        family_for({"model_type": "llava", "text_config": {"model_type": "bloom"}})
    raw = {"model_type": "llava", "text_config": TEXT | {"model_type": "granite", "logits_scaling": 8.0}}
    with pytest.raises(UserError, match="scales or caps its logits"):
        family_for(raw).config_from_hf(raw)
