"""Tiny models, methods that go with all or with dense ones, and what a model computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from inputs import hf_config, random_weights, tiny_config

from cpt_jax.adapt import ByPath, Expand, Full, LoRA, Method
from cpt_jax.core.tree import flatten, unflatten
from cpt_jax.models.decoder import apply_with_balance, logits
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.recipe.model import Model

TOKENS = np.random.default_rng(0).integers(3, 60, (2, 24))
EXPERTS = ExpertsConfig(count=4, per_token=2, renormalise=True, balance_coefficient=0.0)
CONFIGS = {
    "llama": tiny_config(new_rows=6),
    "untied, norms behind too, biases": tiny_config(
        tie_word_embeddings=False, norm_placement="both", attention_out_bias=True, mlp_bias=True, qkv_bias=True
    ),
    "experts": tiny_config(experts=EXPERTS, intermediate_size=24),
    "a shared expert": tiny_config(
        experts=dataclasses.replace(EXPERTS, shared_intermediate_size=40), intermediate_size=24
    ),
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
