"""Tiny models with adapters that tests of PEFT directories share: logits by PEFT and by us."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from cpt_jax.checkpoint.hf import read_config
from cpt_jax.checkpoint.peft import save_adapter
from cpt_jax.core.tree import flatten, unflatten
from cpt_jax.models.decoder import abstract_decoder, apply, logits
from cpt_jax.models.families.composite import auto_class
from cpt_jax.models.vocab_table import NEW_ROWS as NEW_ROWS_OF_TABLES

TOKENS = np.random.default_rng(0).integers(3, 64, (2, 40))
# Of the 64 rows of every tiny model, those that an extension added.
NEW_ROWS = 5
ROWS = list(range(64 - NEW_ROWS, 64))
QUERIES = ["q_proj", "v_proj"]


def theirs(directory, adapter=None, **options) -> np.ndarray:
    """transformers' logits, with an adapter as PEFT applies it."""
    import peft
    import torch
    import transformers

    auto = getattr(transformers, auto_class(read_config(directory)))
    model = auto.from_pretrained(directory, attn_implementation="eager", **options)
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


def trained(model, lora, tables=NEW_ROWS_OF_TABLES):
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


def train_with_peft(directory, base, settings, resize: int | None = None) -> None:
    """Random factors and rows, saved as PEFT saves them."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    if resize is not None:
        model.resize_token_embeddings(resize, mean_resizing=False)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **dict(r=4, lora_alpha=6) | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_A." not in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(directory)


def edit(directory, **changes) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, change) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
