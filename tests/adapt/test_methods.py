"""What trains: attaching changes nothing, merging changes nothing, and adapters compute and learn as PEFT's do."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.family_configs import config_json
from contracts.test_families import reference_model
from inputs import hf_config, random_weights, tiny_config

from cpt_jax.adapt import ByPath, Embeddings, Expand, Full, LoRA, Method
from cpt_jax.checkpoint.hf import save
from cpt_jax.core.config import from_json, override, to_json
from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import combine, flatten, partition, unflatten
from cpt_jax.models.decoder import abstract_decoder, apply, apply_with_balance, logits
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.linear import LoRAConfig
from cpt_jax.recipe.model import Model, load_model

TOKENS = np.random.default_rng(0).integers(3, 60, (2, 24))
EXPERTS = ExpertsConfig(count=4, per_token=2, renormalise=True, balance_coefficient=0.0)
CONFIGS = {
    "llama": tiny_config(new_rows=6),
    "untied, norms behind too, biases": tiny_config(
        tie_word_embeddings=False, norm_placement="both", attention_out_bias=True, mlp_bias=True, qkv_bias=True
    ),
    "experts": tiny_config(experts=EXPERTS, intermediate_size=24),
}
DENSE = {
    "rank-stabilised": LoRA(rank=4, alpha=8, scaling="alpha/sqrt(rank)", norms=True),
    "dora": LoRA(rank=4, alpha=8, dora=True, dropout=0.3),
    "dora, rank-stabilised, few": LoRA(rank=4, alpha=8, targets=("q", "down"), dora=True, scaling="alpha/sqrt(rank)"),
}
ANYWHERE = {
    "lora": LoRA(rank=4, alpha=8),
    "patterns": LoRA(
        rank=4, alpha=8, targets=("layers/*",), rank_pattern={"down": 2, "layers/mlp/*": 6}, alpha_pattern={"q": 3.0}
    ),
    "by path": ByPath(patterns=("layers/*",), layers=(1, 2)),
    "one block more": Expand(blocks=1),
    "every block twice": Expand(blocks=2),
    "full": Full(),
}


def model_of(config) -> Model:
    return Model(config=config, weights=random_weights(config), hf_config=hf_config(config))


def arrays(weights):
    return unflatten({path: jnp.asarray(np.asarray(leaf, np.float32)) for path, leaf in flatten(weights).items()})


def forward(model: Model, weights=None, key=None, tokens=TOKENS) -> jax.Array:
    network, tokens = model.network, jnp.asarray(tokens, jnp.int32)

    @jax.jit
    def run(weights, tokens, key):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden, _ = apply_with_balance(
            network, weights, tokens, positions, jnp.ones_like(tokens), compute_dtype="float32", dropout_key=key
        )
        return logits(network, weights, hidden, compute_dtype="float32")

    return run(arrays(model.weights) if weights is None else weights, tokens, key)


def trained(model: Model, method: Method) -> Model:
    """The model with everything that trains moved."""
    generator, flat = np.random.default_rng(1), flatten(model.weights)
    for path, leaf in flat.items():
        if method.trains(path):
            flat[path] = np.asarray(leaf, np.float32) + generator.normal(0, 0.1, leaf.shape).astype(np.float32)
    return dataclasses.replace(model, weights=unflatten(flat))


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
            self.q, self.k = (Linear(name, ("embed", "heads"), (16, 16), lora, nnx.Rngs(0)) for name in "qk")

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
    scales = {name: model.lora.adapter(name).scale for name in ("q", "k", "gate", "down")}
    assert scales == {"q": 3 / 4, "k": 2, "gate": 8 / 6, "down": 4}


WRONG = {
    "target": (lambda: LoRA(targets=("w1",)), "'w1' matches no weight; there are: layers/attention/q"),
    "pattern of ranks": (lambda: LoRA(rank_pattern={"layers/ffn/*": 3}), "'layers/ffn/\\*' matches no weight"),
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
    norms = {"layers/attention_norm/scale", "layers/mlp_norm/scale", "final_norm/scale"}
    adapters = {f"layers/attention/q/{leaf}" for leaf in ("lora_a", "lora_b", "magnitude")}
    assert paths(LoRA(targets=("q",), dora=True, norms=True, new_rows=False)) == adapters | norms
    assert paths(ByPath(patterns=("layers/*/q/*",), layers=(0, 1))) == {
        "layers/chosen/attention/q/kernel",
        "layers/chosen/attention/q/bias",
    }
    added = paths(Expand(blocks=2))
    assert {path.split("/")[1] for path in added} == {"added_0", "added_1"}
    assert len(added) == 2 * sum(path.startswith("layers/") for path in flatten(abstract_decoder(config).shapes))


def test_methods_come_back_from_json():
    for method in (*ANYWHERE.values(), *DENSE.values(), Embeddings(rows="all", tables="input")):
        assert from_json(Method, to_json(method)) == method

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Holder:
        method: Method

    holder = override(Holder(method=LoRA(rank_pattern={"q": 2})), "method.rank_pattern.q", "5")
    assert holder.method == LoRA(rank_pattern={"q": 5})
    with pytest.raises(UserError, match="alpha/rank"):
        from_json(Method, to_json(LoRA()) | {"scaling": "alpha"})


@pytest.mark.parametrize(
    ("model_type", "name"), [("llama", "tied, odd head dimension"), ("gemma2", "as released"), ("phi3", "window")]
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
    for copy, original in zip((1, 4), (0, 2), strict=False):
        if base.config.layer_pattern is not None:
            assert again.config.layer_pattern is not None
            assert again.config.layer_pattern[copy] == base.config.layer_pattern[original]
    with pytest.raises(UserError, match="as many layers"):
        moved.interpolated(base, 0.5)
