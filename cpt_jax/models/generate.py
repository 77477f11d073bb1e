"""Text, token by token, with a key-value cache."""

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import Tree
from cpt_jax.models.attention import Cache
from cpt_jax.models.decoder import Network

# Prompts are filled up to a multiple of this, so that few lengths are compiled.
PROMPT_MULTIPLE = 64


@functools.lru_cache(maxsize=8)
def _functions(network: Network, dtype: Any, length: int):
    config = network.config

    def run(weights: Tree, tokens, positions, mask, cache: Cache, index) -> tuple[Array, Cache]:
        module = network.module(weights)
        lengths = jnp.full(tokens.shape, index + tokens.shape[1])
        outputs = module(tokens, positions, mask, dtype, lengths=lengths, cache=cache, index=index)
        return module.logits(outputs.hidden, dtype), cast(Cache, outputs.cache)

    @jax.jit
    def read_prompt(weights: Tree, tokens, count):
        shape = (config.num_layers, 1, config.num_kv_heads, length, config.head_dim)
        cache = Cache(jnp.zeros(shape), jnp.zeros(shape))
        size = tokens.shape[1]
        # Keys behind the prompt's end are never seen: a query sees positions up to its own.
        mask = (jnp.arange(length)[None, :] <= jnp.arange(size)[:, None])[None]
        logits, cache = run(weights, tokens, jnp.arange(size)[None], mask, cache, jnp.int32(0))
        return logits[0, count - 1], cache

    @functools.partial(jax.jit, donate_argnums=2)
    def read_token(weights: Tree, token, cache: Cache, index):
        mask = (jnp.arange(length) <= index)[None, None]
        logits, cache = run(weights, token[None, None], index[None, None], mask, cache, index)
        return logits[0, 0], cache

    return read_prompt, read_token


def generate(
    network: Network,
    weights: Tree,
    prompt: Sequence[int],
    *,
    new_tokens: int,
    end_ids: Sequence[int] = (),
    compute_dtype: Any = "float32",
) -> list[int]:
    """The most likely next tokens, one after the other: up to `new_tokens`, or to one of `end_ids` (which is not
    returned).

    Raises:
      UserError: an empty prompt, or one that leaves no room in the model's context.
    """
    if not prompt:
        raise UserError("the prompt is empty: give at least one token")
    limit = network.config.max_position_embeddings
    if len(prompt) + new_tokens > limit:
        raise UserError(
            f"{len(prompt)} prompt tokens and {new_tokens} new ones do not fit in the model's context of {limit}"
        )
    filled = -(-len(prompt) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    length = -(-(filled + new_tokens) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    read_prompt, read_token = _functions(network, jnp.dtype(compute_dtype), length)
    tokens = np.zeros((1, filled), np.int32)
    tokens[0, : len(prompt)] = prompt
    logits, cache = read_prompt(weights, tokens, len(prompt))
    produced: list[int] = []
    for index in range(len(prompt), len(prompt) + new_tokens):
        token = int(jnp.argmax(logits))
        if token in end_ids:
            break
        produced.append(token)
        logits, cache = read_token(weights, jnp.int32(token), cache, jnp.int32(index))
    return produced
