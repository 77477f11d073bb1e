"""Tiny models with adapters that tests of PEFT directories share: logits by PEFT and by us."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from cpt_jax.checkpoint.peft import save_adapter
from cpt_jax.core.tree import flatten, unflatten
from cpt_jax.models.decoder import abstract_decoder, apply, logits

TOKENS = np.random.default_rng(0).integers(3, 64, (2, 40))
# Of the 64 rows of every tiny model, those that an extension added.
NEW_ROWS = 5
ROWS = list(range(64 - NEW_ROWS, 64))


def theirs(directory, adapter=None) -> np.ndarray:
    """transformers' logits, with an adapter as PEFT applies it."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def ours(config, weights, lora=None) -> np.ndarray:
    network = abstract_decoder(config, lora)

    @jax.jit
    def forward(weights, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden = apply(network, weights, tokens, positions, jnp.ones_like(tokens), compute_dtype="float32")
        return logits(network, weights, hidden, compute_dtype="float32")

    arrays = {path: jnp.asarray(np.asarray(leaf)) for path, leaf in flatten(weights).items()}
    return np.asarray(forward(unflatten(arrays), jnp.asarray(TOKENS, jnp.int32)))


def trained(model, lora, tables=("embed/new", "head/new")):
    """(the model with random factors and tables, their paths)."""
    generator, flat = np.random.default_rng(1), flatten(model.weights)
    shapes = flatten(abstract_decoder(model.config, lora).shapes)
    paths = [path for path in shapes if path.endswith(("/lora_a", "/lora_b")) or path in tables]
    for path in paths:
        spread = shapes[path].shape[-2] ** -0.5 if path.endswith("/lora_a") else 0.1
        flat[path] = generator.normal(0, spread, shapes[path].shape).astype(np.float32)
    return dataclasses.replace(model, weights=unflatten(flat), lora=lora), paths


def saved(model, paths, directory, base, **changes):
    return save_adapter(
        directory, model.config, model.weights, model.hf_config, model.lora, base=str(base), trained=paths, **changes
    )
