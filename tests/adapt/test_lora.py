"""LoRA and its variants are PEFT's; what is dropped, and where a pattern's rank counts."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import tiny_config
from method_inputs import CONFIGS, TOKENS, arrays, forward, model_of, trained

from cpt_jax.adapt import Full, LoRA
from cpt_jax.checkpoint.hf_write import save
from cpt_jax.core.tree import combine, flatten, partition
from cpt_jax.models.decoder import apply, apply_with_balance, logits
from cpt_jax.models.linear import LoRAConfig

MODULES = {
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
LEAVES = {
    "lora_a": "lora_A.default.weight",
    "lora_b": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
    "scale": "modules_to_save.default.weight",
}
AS_PEFT = {
    "lora": (LoRA(rank=4, alpha=6.0), {}),
    "rslora": (LoRA(rank=4, alpha=6.0, scaling="alpha/sqrt(rank)"), dict(use_rslora=True)),
    "dora": (LoRA(rank=4, alpha=6.0, dora=True), dict(use_dora=True)),
    "dora, rslora, patterns": (
        LoRA(
            rank=4,
            alpha=6.0,
            dora=True,
            scaling="alpha/sqrt(rank)",
            rank_pattern={"layers/mlp/*": 2, "q": 3},
            alpha_pattern={"q": 9.0},
        ),
        dict(use_dora=True, use_rslora=True, rank_pattern={".*mlp.*": 2, "q_proj": 3}, alpha_pattern={"q_proj": 9.0}),
    ),
    "norms": (
        LoRA(rank=4, alpha=6.0, norms=True),
        dict(modules_to_save=["norm", "input_layernorm", "post_attention_layernorm"]),
    ),
}


def name_in_peft(path: str, layer: int) -> str:
    module, _, leaf = path.removeprefix("layers/").rpartition("/")
    place = "norm" if module == "final_norm" else f"layers.{layer}.{MODULES[module]}"
    return f"base_model.model.model.{place}.{LEAVES[leaf]}"


@pytest.mark.parametrize(("method", "settings"), AS_PEFT.values(), ids=AS_PEFT)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_logits_and_gradients_are_those_of_peft(method, settings, tmp_path):
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = model_of(tiny_config())
    save(tmp_path, base.config, base.weights, base.hf_config, tmp_path)
    model = trained(base.adapted(method, seed=0), method)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    names = [module.split(".")[1] for module in MODULES.values() if module.endswith("proj")]
    reference = peft.get_peft_model(
        reference, peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, lora_dropout=0.0, **settings)
    )
    theirs = dict(reference.named_parameters())
    trainable, frozen = partition(arrays(model.weights), method.trains)

    def each_leaf(tree):
        for path, leaf in flatten(tree).items():
            stack = [leaf] if not path.startswith("layers/") else list(leaf)
            for layer, part in enumerate(stack):
                yield name_in_peft(path, layer), np.asarray(part.T if part.ndim == 2 else part)

    with torch.no_grad():
        for name, value in each_leaf(trainable):
            theirs[name].copy_(torch.tensor(value))
    assert {name for name, _ in each_leaf(trainable)} == {name for name, p in theirs.items() if p.requires_grad}
    weight = np.random.default_rng(5).normal(size=(*TOKENS.shape, base.config.vocab_size)).astype(np.float32)
    expected = reference(torch.tensor(TOKENS)).logits
    np.testing.assert_allclose(forward(model), expected.detach().numpy(), atol=1e-4)
    (expected * torch.tensor(weight)).sum().backward()

    def objective(trainable):
        weights, tokens = combine(trainable, frozen), jnp.asarray(TOKENS, jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden = apply(model.network, weights, tokens, positions, jnp.ones_like(tokens), compute_dtype="float32")
        return (logits(model.network, weights, hidden, compute_dtype="float32") * weight).sum()

    for name, gradient in each_leaf(jax.jit(jax.grad(objective))(trainable)):
        wanted = theirs[name].grad.numpy()
        np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("method", [LoRA(rank=4, alpha=8, dora=True, dropout=0.1), Full()], ids=["dora", "full"])
def test_dora_makes_neither_the_merged_kernel_nor_its_gradient(method):
    model = model_of(tiny_config(intermediate_size=40)).adapted(method, 0)
    trainable, frozen = partition(arrays(model.weights), method.trains)
    tokens = jnp.asarray(TOKENS, jnp.int32)

    def objective(trainable, key):
        weights, segments = combine(trainable, frozen), jnp.ones_like(tokens)
        return apply_with_balance(
            model.network, weights, tokens, tokens, segments, compute_dtype="float32", dropout_key=key
        )[0].sum()

    compiled = jax.jit(jax.grad(objective)).lower(trainable, jax.random.key(0)).compile().as_text()
    # Products as large as a kernel of the feed-forward; training all of it, they are its gradients.
    assert bool(re.findall(r"f32\[(?:32,40|40,32)\]\S* dot\(", compiled)) == (method == Full())


def test_dropout_keeps_the_mean_and_evaluation_drops_nothing():
    method = LoRA(rank=4, alpha=2, targets=("down",), dropout=0.4)
    model = trained(model_of(tiny_config(num_layers=1)).adapted(method, 0), method)
    plain = dataclasses.replace(model, lora=dataclasses.replace(model.lora, dropout=0.0))
    weights = arrays(model.weights)
    still = forward(plain, weights)
    np.testing.assert_array_equal(forward(model, weights), still)
    keys = jax.random.split(jax.random.key(1), 300)
    np.testing.assert_array_equal(forward(plain, weights, keys[0]), still)
    first, again, second = (forward(model, weights, key) for key in (keys[0], keys[0], keys[1]))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 0.01

    network, tokens = model.network, jnp.asarray(TOKENS, jnp.int32)

    @jax.jit
    def hidden(key):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        return apply_with_balance(
            network, weights, tokens, positions, jnp.ones_like(tokens), compute_dtype="float32", dropout_key=key
        )[0]

    several = np.stack([hidden(key) for key in keys])
    deviation = several.std(0, ddof=1) / np.sqrt(len(keys))
    # The final norm bends the mean a little; without the division by 0.6 it would be off by half of the adapter's part.
    z = (several.mean(0) - hidden(None)) / deviation
    assert np.abs(z).mean() < 1.5


def test_layers_and_linears_drop_differently():
    """With the same weights in both layers and no residual difference, only the key tells them apart."""
    from flax import nnx

    from cpt_jax.models.linear import Linear, drop_inputs

    class Pair(nnx.Module):
        def __init__(self):
            lora = LoRAConfig(rank=8, alpha=8, dropout=0.5)
            self.q, self.k = (
                Linear(f"layers/attention/{name}", ("embed", "heads"), (16, 16), lora, nnx.Rngs(0)) for name in "qk"
            )

    pair, x = Pair(), jnp.ones((4, 16))
    for linear in (pair.q, pair.k):
        linear.lora_b[...] = jnp.ones((8, 16))
    np.testing.assert_array_equal(pair.q(x, jnp.dtype("float32")), pair.k(x, jnp.dtype("float32")))
    drop_inputs(pair, jax.random.key(0))
    assert np.abs(pair.q(x, jnp.dtype("float32")) - pair.k(x, jnp.dtype("float32"))).max() > 0.01


def test_a_pattern_gives_its_linears_their_rank_and_the_first_counts():
    method = LoRA(rank=4, alpha=8, rank_pattern={"down": 2, "layers/mlp/*": 6}, alpha_pattern={"layers/*/q": 3.0})
    model = model_of(tiny_config()).adapted(method, 0)
    shapes = {path: leaf.shape[-1] for path, leaf in flatten(model.weights).items() if path.endswith("lora_a")}
    assert shapes == {
        "layers/attention/q/lora_a": 4,
        "layers/attention/k/lora_a": 4,
        "layers/attention/v/lora_a": 4,
        "layers/attention/o/lora_a": 4,
        "layers/mlp/gate/lora_a": 6,
        "layers/mlp/up/lora_a": 6,
        "layers/mlp/down/lora_a": 2,
    }
    assert model.lora is not None
    scales = {"attention/q": 3 / 4, "attention/k": 2, "mlp/gate": 8 / 6, "mlp/down": 4}
    assert {path: model.lora.adapter(f"layers/{path}").scale for path in scales} == scales


def test_a_name_means_the_shared_expert_too_and_its_path_it_alone():
    def adapted(method: LoRA) -> set[str]:
        model = model_of(CONFIGS["a shared expert"]).adapted(method, 0)
        return {path.removesuffix("/lora_a") for path in flatten(model.weights) if path.endswith("/lora_a")}

    assert adapted(LoRA(targets=("gate",))) == {"layers/mlp/gate", "layers/mlp/shared/gate"}
    assert adapted(LoRA(targets=("layers/mlp/gate",))) == {"layers/mlp/gate"}
    assert adapted(LoRA(targets=("shared_gate",))) == {"layers/mlp/shared_gate"}
    assert len(adapted(LoRA())) == 4 + 3 + 3
    shared = {f"layers/mlp/shared/{name}" for name in ("gate", "up", "down")}
    # What experts that are chosen do not have.
    assert adapted(LoRA(targets=("layers/mlp/shared/*",), dora=True, dropout=0.1)) == shared


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_part_of_a_merged_kernel_is_that_part_of_the_whole(dora):
    """As devices and files read it: DoRA's norms are of whole columns."""
    method = LoRA(rank=4, alpha=8, dora=dora)
    merged = flatten(trained(model_of(tiny_config()).adapted(method, 0), method).merged().weights)
    for path in ("layers/attention/o/kernel", "layers/mlp/up/kernel"):
        part = (slice(1, 2), slice(3, 9), slice(2, 7))
        np.testing.assert_allclose(merged[path][part], np.asarray(merged[path])[part], rtol=1e-6)


def test_dora_bears_an_output_whose_weights_are_zero():
    from flax import nnx

    from cpt_jax.models.linear import Linear

    lora = LoRAConfig(rank=2, alpha=2, dora=True)
    linear, x = Linear("layers/attention/q", ("embed", "heads"), (8, 4), lora, nnx.Rngs(0)), jnp.ones((3, 8))
    for weight in (linear.kernel, linear.kernel_norm, linear.magnitude):
        weight[...] = weight[...].at[..., 1].set(0)
    found = linear(x, jnp.dtype("float32"))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[:, 1], 0)
