"""What every family owes: transformers' logits and gradients, and its files back bit for bit."""

import contextlib
import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.config_parts import ALTERNATING, LOCAL_ROPE, PROPORTIONAL, YARN
from contracts.family_configs import CONFIGS, config_json
from jaxtyping import Array
from safetensors.numpy import load_file

from cpt_jax.checkpoint.hf import load
from cpt_jax.checkpoint.hf_write import hf_tensor, save
from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import flatten
from cpt_jax.models.cross_entropy import TableUse, token_losses
from cpt_jax.models.decoder import abstract_decoder, apply, head_path, logits
from cpt_jax.models.families import FAMILIES, family_for
from cpt_jax.models.families.composite import auto_class
from cpt_jax.models.linear import ACTIVATIONS
from cpt_jax.models.remat import Remat

LENGTH = 40
# In transformers too they are no parameters, or have no gradient.
CONSTANTS = ("layer_scalar", "e_score_correction_bias", "expert_bias", "act_fn.beta", "act_fn.eps")
CASES = [(model_type, name) for model_type, configs in CONFIGS.items() for name in configs]


def test_every_family_has_contract_tests():
    """A family that is not here was never compared with transformers."""
    assert CONFIGS.keys() == FAMILIES.keys()
    for model_type, configs in CONFIGS.items():
        assert len(configs) >= 3, f"{model_type} needs three configurations at least"
        assert {config["tie_word_embeddings"] for config in configs.values()} == {True, False}, model_type


def reference_model(raw: dict, directory):
    """A transformers model with weights large enough that every part matters, saved."""
    import torch
    import transformers
    from transformers import AutoConfig

    fields = {name: value for name, value in raw.items() if name != "model_type"}
    torch.manual_seed(0)
    config = AutoConfig.for_model(raw["model_type"], **json.loads(json.dumps(fields)))
    auto = getattr(transformers, auto_class(raw))
    model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        constants = [buffer for name, buffer in model.named_buffers() if name.endswith(CONSTANTS)]
        for parameter in (*model.parameters(), *constants):
            spread = 0.1 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
            start = parameter if parameter.ndim < 2 else torch.zeros(())
            parameter.copy_(start + spread * torch.randn(parameter.shape))
    model.save_pretrained(directory)
    # The config.json as its makers write it, not as transformers 5 does.
    (directory / "config.json").write_text(json.dumps(raw | {"architectures": [type(model).__name__]}))
    return model


def gradients_by_tensor(model) -> dict[str, np.ndarray]:
    """Gradients by the names of the files; in memory, transformers names some otherwise, and holds the experts of a
    layer in one parameter."""
    found = {name: each.grad.numpy() for name, each in model.named_parameters() if not name.endswith(CONSTANTS)}
    if model.config.model_type == "nemotron_h":
        found = {name.replace("model.", "backbone."): value for name, value in found.items()}
    if model.config.model_type.startswith("granitemoe"):
        renamed = {".experts.gate_up_proj": ".input_linear.weight", ".experts.down_proj": ".output_linear.weight"}
        for old, new in (renamed | {"router.weight": "router.layer.weight"}).items():
            found = {name.replace(old, new): value for name, value in found.items()}
    stacked = model.config.model_type == "gpt_oss"
    for name in [name for name in found if ".experts." in name and not stacked]:
        prefix, _, part = name.rpartition(".")
        whole = found.pop(name)
        for expert, matrix in enumerate(whole):
            if part != "gate_up_proj":
                parts = {part: matrix}
            else:
                parts = dict(zip(("gate_proj", "up_proj"), np.split(matrix, 2), strict=True))
            found |= {f"{prefix}.{expert}.{key}.weight": value for key, value in parts.items()}
    if model.config.model_type == "gpt_neox" and "lm_head.weight" in found:
        found["embed_out.weight"] = found.pop("lm_head.weight")
    if model.config.model_type == "lfm3":
        found = {name.replace(".g_proj.", ".gate_proj."): value for name, value in found.items()}
    if model.config.model_type in ("mixtral", "minimax_m2", "lfm2_moe"):
        renamed = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        found = {name.replace(".mlp.", ".block_sparse_moe."): value for name, value in found.items()}
        for old, new in renamed.items():
            found = {name.replace(old, new): value for name, value in found.items()}
    return found


class Ours:
    """A loaded directory with its compiled functions, of batches [2, LENGTH]."""

    def __init__(self, directory) -> None:
        self.config, leaves, self.raw = load(directory)
        self.weights = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, leaves))
        network, table = abstract_decoder(self.config), head_path(self.config)

        @jax.jit
        def in_float64(weights, tokens, positions, segments):
            hidden = apply(network, weights, tokens, positions, segments, compute_dtype="float64")
            return logits(network, weights, hidden, compute_dtype="float64")

        @jax.jit
        @functools.partial(jax.grad, has_aux=True)
        def gradient(weights, tokens, positions, segments):
            hidden = apply(network, weights, tokens, positions, segments, compute_dtype="float32")
            rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
            targets = tokens[:, 1:].reshape(-1)
            tables, uses = (weights[table]["base"],), (TableUse(self.config.vocab_size, True),)
            ones = jnp.ones(targets.shape)
            loss = token_losses(rows, tables, targets, ones, "float32", uses, self.config.logit_softcap)[0]
            return loss, logits(network, weights, hidden, compute_dtype="float32")

        self.in_float64, self.gradient = in_float64, gradient

    def forward(self, *inputs) -> Array:
        """Logits; of the program that makes the gradient, which is the only one in float32 that is compiled."""
        if jax.config.jax_enable_x64:
            return self.in_float64(self.weights, *inputs)
        return self.gradient(self.weights, *inputs)[1]


def unpacked(tokens: np.ndarray) -> tuple[np.ndarray, ...]:
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return tokens, positions, np.ones(tokens.shape, np.int32)


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_logits_gradients_and_files_are_those_of_transformers(model_type, name, tmp_path):
    import torch

    raw = config_json(model_type, name)
    reference = reference_model(raw, tmp_path / "theirs")
    ours = Ours(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(3, raw["vocab_size"], (2, LENGTH), dtype=np.int32)
    theirs = reference(torch.tensor(tokens, dtype=torch.long)).logits
    gradient, found = ours.gradient(ours.weights, *unpacked(tokens))
    np.testing.assert_allclose(found, theirs.detach().numpy(), atol=1e-4)

    expected = torch.nn.functional.cross_entropy(
        theirs[:, :-1].flatten(0, 1), torch.tensor(tokens[:, 1:].reshape(-1), dtype=torch.long), reduction="sum"
    )
    expected.backward()
    mine = flatten(jax.tree.map(np.asarray, gradient))
    names = family_for(raw).weight_names(ours.config)
    reference_gradients = gradients_by_tensor(reference)
    for tensor, gradient in reference_gradients.items():
        stack = [tuple(places) for _, places in itertools.groupby(names[tensor], key=lambda place: place.member)]
        members = [hf_tensor(places, mine, ours.config, np.dtype(np.float32)) for places in stack]
        found = members[0] if names[tensor][0].member is None else np.stack(members)
        np.testing.assert_allclose(
            found, gradient, rtol=1e-3, atol=1e-3 * max(np.abs(gradient).max(), 1e-3), err_msg=tensor
        )
    constants = {name for name in names if name.endswith(CONSTANTS)}
    assert reference_gradients.keys() == names.keys() - constants

    save(tmp_path / "ours", ours.config, ours.weights, ours.raw, tmp_path, shard_bytes=20_000)
    before, after = (
        {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}
        for directory in (tmp_path / "theirs", tmp_path / "ours")
    )
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        np.testing.assert_array_equal(after[tensor], value, err_msg=tensor)
    again = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert again == ours.raw | {"dtype": "float32"}

    # A head that linear attention leaves near zero is scaled up by its norm, rounding errors too.
    linear = not all(kind.attends for kind in ours.config.layer_kinds)
    with jax.enable_x64() if linear else contextlib.nullcontext():
        packed_and_padded(ours)


def packed_and_padded(ours: Ours) -> None:
    """Documents in one row, and one behind padding, give the logits that each gives alone."""
    generator = np.random.default_rng(1)
    sizes = (11, LENGTH - 11, 13)
    documents = [generator.integers(3, ours.config.vocab_size, size, dtype=np.int32) for size in sizes]
    tokens, positions, segments = (np.zeros((2, LENGTH), np.int32) for _ in range(3))
    places = [(0, 0), (0, 11), (1, LENGTH - 13)]
    for segment, (document, (row, first)) in enumerate(zip(documents, places, strict=True), start=1):
        where = (row, slice(first, first + len(document)))
        tokens[where], positions[where], segments[where] = document, np.arange(len(document)), segment
    together = np.asarray(ours.forward(tokens, positions, segments))
    for document, (row, first) in zip(documents, places, strict=True):
        # Alone: at the row's beginning, with nothing behind it.
        alone = np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH), np.int32)
        place = (0, slice(0, len(document)))
        alone[0][place], alone[1][place], alone[2][place] = document, np.arange(len(document)), 1
        expected = np.asarray(ours.forward(*alone))[0, : len(document)]
        np.testing.assert_allclose(together[row, first : first + len(document)], expected, atol=2e-5)


# What a config of a family may not ask for, and what is said.
REFUSED = [
    (
        "gpt_oss",
        dict(quantization_config=dict(quant_method="gptq", bits=4)),
        "quantization_config={'quant_method': 'gptq', 'bits': 4}, which is not supported for model_type gpt_oss",
    ),
    ("olmoe", dict(clip_qkv=8.0), "clip_qkv=8.0, which is not supported for model_type olmoe"),
    (
        "qwen2_moe",
        dict(decoder_sparse_step=2),
        "decoder_sparse_step=2, which is not supported for model_type qwen2_moe",
    ),
    ("qwen2_moe", dict(mlp_only_layers=[0]), "mlp_only_layers=.0., which is not supported for model_type qwen2_moe"),
    ("qwen2_moe", dict(shared_expert_intermediate_size=0), "shared_expert_intermediate_size is 0: give at least 1"),
    ("qwen3_5_text", dict(hidden_act="gelu"), "hidden_act='gelu', which is not supported for model_type qwen3_5_text"),
    ("qwen3_next", dict(mlp_only_layers=[0]), "mlp_only_layers=.0., which is not supported for model_type qwen3_next"),
    (
        "granitemoehybrid",
        dict(position_embedding_type="alibi"),
        "position_embedding_type='alibi', which is not supported for model_type granitemoehybrid",
    ),
    ("granitemoehybrid", dict(hidden_act="gelu"), "hidden_act='gelu', which is not supported for model_type granite"),
    ("granitemoehybrid", dict(mamba_n_groups=3), "mamba_n_heads 4 is no multiple of mamba_n_groups 3"),
    (
        "nemotron_h",
        dict(hybrid_override_pattern="MEM*E", moe_latent_size=0),
        "moe_latent_size is 0: give at least 1",
    ),
    (
        "ernie4_5_moe",
        dict(moe_layer_end_index=1),
        "moe_layer_end_index has layers without experts behind such with them",
    ),
    ("ernie4_5_moe", dict(use_bias=True), "use_bias=True, which is not supported for model_type ernie4_5_moe"),
    (
        "exaone_moe",
        dict(mlp_layer_types=["sparse", "dense", "sparse", "sparse"]),
        "mlp_layer_types has layers without experts behind such with them",
    ),
    ("glm4_moe", dict(topk_group=2), "topk_group 2 is not between 1 and n_group 1"),
    ("glm4_moe", dict(first_k_dense_replace=3), "the first 3 of 3 layers have no experts: the others must"),
    ("stablelm", dict(qk_layernorm=True), "qk_layernorm=True, which is not supported for model_type stablelm"),
    ("hunyuan_v1_moe", dict(moe_topk=[2, 2, 3]), "moe_topk=.2, 2, 3.: layers with different numbers of experts"),
    ("cohere", dict(use_qk_norm=True), "use_qk_norm=True, which is not supported for model_type cohere"),
    (
        "gemma4_text",
        dict(hidden_size_per_layer_input=8),
        "vocab_size_per_layer_input=262144 .the default is 262144. beside vocab_size=64",
    ),
    ("gemma4_text", dict(num_kv_shared_layers=6), "before them no layer has those of attention"),
    (
        "gemma4_text",
        dict(use_bidirectional_attention="all"),
        "use_bidirectional_attention='all', which is not supported",
    ),
    ("gemma4_text", dict(per_layer_config={"5": dict(sliding_window=3)}), "has 'sliding_window' in per_layer_config"),
    (
        "gemma4_text",
        dict(per_layer_config={"0": dict(head_dim=16)}),
        "layers of type sliding_attention have different heads in per_layer_config",
    ),
    (
        "gemma4_text",
        dict(num_global_key_value_heads=3),
        "num_attention_heads 4 is no multiple of num_key_value_heads 3",
    ),
    (
        "youtu",
        dict(num_key_value_heads=2),
        "num_key_value_heads is 2: latents are expanded to keys for each of the 4 heads",
    ),
    ("deepseek_v3", dict(scoring_func="softmax"), "scoring_func='softmax', which is not supported"),
    ("deepseek_v2", dict(norm_topk_prob=True), "norm_topk_prob=True, which is not supported"),
    (
        "glm4_moe_lite",
        dict(mlp_layer_types=["sparse", "dense", "sparse"]),
        "mlp_layer_types=.*the first layers dense, the others sparse, 3 in all",
    ),
    ("mistral4", dict(rope_parameters=YARN | dict(rope_theta=1e4)), "llama_4_scaling_beta=None.*mistral4's queries"),
    ("ministral3", dict(rope_parameters=YARN), "llama_4_scaling_beta=None"),
    ("ministral3", dict(layer_types=ALTERNATING), "layer_types=.*not supported for model_type ministral3"),
    (
        "lfm3",
        dict(
            rope_parameters=dict(full_attention=PROPORTIONAL | dict(rope_type="default"), sliding_attention=LOCAL_ROPE)
        ),
        "partial_rotary_factor=0.5, which is not supported for model_type lfm3",
    ),
    ("smollm3", dict(layer_types=ALTERNATING, sliding_window=6), "use_sliding_window=False and sliding_window=6"),
    (
        "smollm3",
        dict(no_rope_layers=[1, 0], layer_types=["full_attention"] * 3),
        "no_rope_layers names 2 layers, num_hidden_layers 3",
    ),
]


@pytest.mark.parametrize(("model_type", "changes", "said"), REFUSED)
def test_what_a_family_does_not_support_is_refused_by_name(model_type, changes, said):
    raw = config_json(model_type, next(iter(CONFIGS[model_type]))) | changes
    with pytest.raises(UserError, match=said):
        family_for(raw).config_from_hf(raw)


def test_the_balance_of_gpt_oss_counts_where_transformers_counts_it():
    raw = config_json("gpt_oss", "as released")
    for asked, expected in ((False, 0.0), (True, 0.9)):
        experts = family_for(raw).config_from_hf(raw | dict(output_router_logits=asked)).experts
        assert experts is not None
        assert experts.balance_coefficient == expected


def test_solar_open_need_not_say_a_width_that_nothing_has():
    raw = config_json("solar_open", "as released")
    without = {name: value for name, value in raw.items() if name != "intermediate_size"}
    assert family_for(raw).config_from_hf(without) == family_for(raw).config_from_hf(raw)


def test_infinities_are_read_as_transformers_writes_them():
    raw = config_json("granitemoehybrid", "biases of projections")
    written = raw | dict(time_step_limit=[0.0, {"__float__": "Infinity"}])
    assert family_for(raw).config_from_hf(written) == family_for(raw).config_from_hf(raw)


def test_activations_are_those_of_transformers():
    import torch
    from transformers.activations import ACT2FN

    x = np.linspace(-9, 9, 1001, dtype=np.float32)
    for name, activation in ACTIVATIONS.items():
        np.testing.assert_allclose(activation(jnp.asarray(x)), ACT2FN[name](torch.tensor(x)), atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "model_type", ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "qwen3_next", "granitemoehybrid", "gpt_oss"]
)
def test_the_load_balancing_loss_is_that_of_transformers(model_type, tmp_path):
    import torch

    from cpt_jax.models.decoder import apply_with_balance

    raw = config_json(model_type, next(iter(CONFIGS[model_type])))
    reference = reference_model(raw, tmp_path / "theirs")
    ours = Ours(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(3, raw["vocab_size"], (2, LENGTH), dtype=np.int32)
    attended = np.ones(tokens.shape, np.int32)
    attended[1, :9] = 0
    theirs = reference(
        torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(attended), output_router_logits=True
    )
    positions = np.maximum(np.cumsum(attended, axis=1) - 1, 0).astype(np.int32)
    _, balance = apply_with_balance(
        abstract_decoder(ours.config),
        ours.weights,
        tokens,
        positions,
        attended,
        jnp.asarray(attended, jnp.float32),
        compute_dtype="float32",
    )
    np.testing.assert_allclose(balance, theirs.aux_loss.item(), rtol=1e-5)


def test_layers_of_two_kinds_are_the_same_scanned_and_unrolled(tmp_path):
    raw = config_json("gemma3_text", "linear")
    reference_model(raw, tmp_path)
    ours = Ours(tmp_path)
    tokens = np.random.default_rng(0).integers(3, raw["vocab_size"], (2, LENGTH), dtype=np.int32)
    expected = ours.forward(*unpacked(tokens))
    unrolled = abstract_decoder(dataclasses.replace(ours.config, layer_loop="unroll", remat=Remat()))
    hidden = apply(unrolled, ours.weights, *map(jnp.asarray, unpacked(tokens)), compute_dtype="float32")
    found = logits(unrolled, ours.weights, hidden, compute_dtype="float32")
    np.testing.assert_allclose(found, expected, atol=1e-5)
