"""The decoder, and the pure functions that run it on a tree of weights.

The modules are built once, abstractly, and split; from then on a network is its static `graphdef` and weights are
nested dicts of arrays, with paths like "layers/attention/q/kernel" (all layers stacked along the first axis).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import Tree, flatten, unflatten
from cpt_jax.models.attention import Cache, document_mask, rotation
from cpt_jax.models.layers import Block, RMSNorm
from cpt_jax.models.linear import LoRAConfig
from cpt_jax.models.vocab_table import VocabTable
from cpt_jax.sharding.rules import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder. The vocabulary has `vocab_size` rows of the base's and `new_rows` behind them.

    Each of the two tables is padded to a multiple of `row_multiple`, as accelerators like it; padded rows are never
    predicted, and are not saved.

    `layer_loop`: "scan" compiles one layer; "unroll" compiles all of them, which takes several times as long and
    runs about a fifth faster on a CPU. `remat` recomputes each layer's activations in the backward pass.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    new_rows: int = 0
    row_multiple: int = 1
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 2048
    layer_loop: Literal["scan", "unroll"] = "scan"
    remat: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_attention_heads {self.num_heads} is no multiple of num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd: rotary positions need pairs")

    @property
    def total_rows(self) -> int:
        """Tokens of both tables."""
        return self.vocab_size + self.new_rows

    def padded(self, rows: int) -> int:
        """Rows that a table of so many tokens has."""
        return -(-rows // self.row_multiple) * self.row_multiple

    @property
    def table_rows(self) -> dict[str, int]:
        """Tokens of each table by its name."""
        return {"base": self.vocab_size} | ({"new": self.new_rows} if self.new_rows else {})


class Decoder(nnx.Module):
    """Embedding, blocks, final norm; the head is the embedding itself when it is tied."""

    def __init__(self, config: DecoderConfig, lora: LoRAConfig | None, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = VocabTable(config, rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0, axis_size=config.num_layers)
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, lora, rngs)

        self.layers = stacked_blocks(rngs)
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = VocabTable(config, rngs)

    def __call__(self, tokens, positions, mask, dtype, cache: Cache | None = None, index=None):
        x = constrain(self.embed.lookup(tokens, dtype), "batch", "sequence", "hidden")
        angles = rotation(positions, self.config.head_dim, self.config.rope_theta)
        graphdef, stacked = nnx.split(self.layers)

        def layer(x, weights_and_cache):
            weights, cache = weights_and_cache
            return nnx.merge(graphdef, weights)(x, angles, mask, dtype, cache, index)

        if self.config.remat:
            layer = jax.checkpoint(layer)
        unroll = self.config.num_layers if self.config.layer_loop == "unroll" else 1
        x, cache = jax.lax.scan(layer, x, (stacked, cache), unroll=unroll)
        return self.final_norm(x), cache

    def logits(self, hidden, dtype):
        return (self.embed if self.config.tie_word_embeddings else self.head).logits(hidden, dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A decoder without weights: how to rebuild it, its weights' shapes, and their logical axes.

    One object a configuration (`abstract_decoder` keeps them), compared by identity: it is a key of compiled functions.
    """

    config: DecoderConfig
    lora: LoRAConfig | None
    graphdef: Any
    state: Any
    shapes: Tree
    logical_axes: Tree

    def module(self, weights: Tree) -> Decoder:
        """The decoder with these weights, for use inside one traced function."""
        state = jax.tree.map(lambda leaf: leaf, self.state)
        nnx.replace_by_pure_dict(state, weights)
        return nnx.merge(self.graphdef, state)


@functools.lru_cache(maxsize=32)
def abstract_decoder(config: DecoderConfig, lora: LoRAConfig | None = None) -> Network:
    """The network of a configuration; nothing is allocated."""
    module = nnx.eval_shape(lambda: Decoder(config, lora, nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    shapes = nnx.to_pure_dict(state)

    def axes(path, variable):
        stacked = jax.tree_util.keystr(path[:1]).strip(".[]'\"") == "layers"
        return (("layers",) if stacked else ()) + tuple(variable.get_metadata("logical_axes"))

    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    logical_axes = nnx.to_pure_dict(jax.tree_util.tree_map_with_path(axes, state, is_leaf=is_variable))
    return Network(config, lora, graphdef, state, shapes, logical_axes)


def initial_weights(network: Network, key: Array, wanted: Callable[[str], bool] = lambda path: True) -> Tree:
    """Random weights, float32: matrices normal by their inputs' number, tables normal 0.02, norms one, adapters' B
    zero.

    Only those whose path is `wanted` are computed.
    """

    @jax.jit
    def draw(key: Array) -> dict[str, Array]:
        weights = flatten(nnx.to_pure_dict(nnx.state(Decoder(network.config, network.lora, nnx.Rngs(key)))))
        return {path: leaf for path, leaf in weights.items() if wanted(path)}

    return unflatten(draw(key))


def apply(
    network: Network,
    weights: Tree,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    *,
    compute_dtype: Any,
) -> Float[Array, "B S D"]:
    """Hidden states after the final norm. Tokens see earlier tokens of their own segment; positions restart with
    each."""
    hidden, _ = network.module(weights)(tokens, positions, document_mask(segment_ids), jnp.dtype(compute_dtype))
    return hidden


def logits(
    network: Network, weights: Tree, hidden: Float[Array, "*rows D"], *, compute_dtype: Any
) -> Float[Array, "*rows V"]:
    """Next-token logits over base and new rows, float32."""
    return network.module(weights).logits(hidden, jnp.dtype(compute_dtype))


def head_path(config: DecoderConfig) -> str:
    """The path of the table that makes the logits."""
    return "embed" if config.tie_word_embeddings else "head"
