"""The decoder, and the pure functions that run it on a tree of weights.

The modules are built once, abstractly, and split; from then on a network is its static `graphdef` and weights are
nested dicts of arrays, with paths like "layers/attention/q/kernel" (all layers stacked along the first axis).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cpt_jax.core.tree import Tree, flatten, unflatten
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.experts import Balance, load_balancing_loss
from cpt_jax.models.kernels.visible import Visible, document_begins, document_lengths
from cpt_jax.models.layer_inputs import InputsOfLayers
from cpt_jax.models.layers import Block
from cpt_jax.models.linear import LoRAConfig, drop_inputs
from cpt_jax.models.norms import norm
from cpt_jax.models.rope import rotations_of
from cpt_jax.models.stack import Caches, LayerInputs, run_blocks, stacked_blocks
from cpt_jax.models.vocab_table import VocabTable
from cpt_jax.sharding.rules import constrain


class Outputs(NamedTuple):
    """Hidden states after the final norm and its `logit_scale`, whose products with the head's rows are the logits; the
    caches with this call's tokens; what each layer's experts were given."""

    hidden: Float[Array, "B S D"]
    caches: Caches | None
    balance: Balance | None


class Decoder(nnx.Module):
    """Embedding, blocks, final norm; the head is the embedding itself when it is tied. Where layers have inputs of their
    own, a second embedding is theirs."""

    def __init__(self, config: DecoderConfig, lora: LoRAConfig | None, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = VocabTable(config, rngs, scale=config.embedding_scale)
        self.layers = stacked_blocks(config, lora, rngs)
        self.final_norm = norm(config)
        if not config.tie_word_embeddings:
            self.head = VocabTable(config, rngs)
        if (size := config.layer_input_size) is not None:
            self.layer_embed = VocabTable(config, rngs, width=config.num_layers * size, scale=size**0.5)
            self.layer_inputs = InputsOfLayers(config, rngs)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        visible: Visible,
        dtype: jnp.dtype,
        *,
        lengths: Int[Array, "B S"] | None = None,
        counted: Float[Array, "B S"] | None = None,
        caches: Caches | None = None,
        dropout_key: Array | None = None,
    ) -> Outputs:
        """Runs all layers.

        Args:
          visible: which keys a query may see; the layers' kinds are filled in here.
          lengths: of the tokens' documents, where rotations depend on it.
          counted: which tokens count for the experts' balance (default: all).
          caches: of all layers; keys begin at the row's beginning, this call's go in at `visible.index`.
          dropout_key: what adapters drop in training follows from it (default: they drop nothing).
        """
        config = self.config
        x = constrain(self.embed.lookup(tokens, dtype), "batch", "sequence", "hidden")
        counted = jnp.ones(tokens.shape, x.dtype) if counted is None else counted
        # Of each mixer by itself: heads may have other sizes in another.
        rotations = {}
        for mixer in dict.fromkeys(config.layer_mixers):
            ropes = [kind.rope if kind.mixer_name == mixer else None for kind in config.layer_kinds]
            parts = rotations_of(positions, lengths, ropes)
            rotations[mixer] = jax.tree.map(lambda *parts: jnp.stack(parts), *parts)
        keys = None if dropout_key is None else jax.random.split(dropout_key, config.num_layers)
        own = None
        if config.layer_input_size is not None:
            own = self.layer_inputs(x, self.layer_embed.lookup(tokens, dtype), dtype)
            own = constrain(own, "layers", "batch", "sequence", "hidden")

        def run(block: Block, x: Array, inputs: LayerInputs) -> tuple[Array, Any, Any]:
            kind = 0 if inputs.kind is None else inputs.kind
            angles, seen = jax.tree.map(lambda each: each[kind], rotations[block.mixer]), visible._replace(kind=kind)
            key, own = inputs.own
            if key is not None:
                drop_inputs(block, key)
            return block(x, angles, seen, dtype, counted, inputs.cache, own)

        x, caches, balance = run_blocks(config, self.layers, x, (keys, own), caches, run)
        hidden = self.final_norm(x)
        return Outputs(hidden if config.logit_scale is None else hidden * config.logit_scale, caches, balance)

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
    segment_ids: Int[Array, "B S"] | None,
    *,
    compute_dtype: Any,
) -> Float[Array, "B S D"]:
    """Hidden states, as `Outputs` has them. Tokens see earlier tokens of their own segment; positions restart with
    each. Without segments each row is one document, which some kernels compute faster."""
    return apply_with_balance(network, weights, tokens, positions, segment_ids, compute_dtype=compute_dtype)[0]


def apply_with_balance(
    network: Network,
    weights: Tree,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"] | None,
    counted: Float[Array, "B S"] | None = None,
    *,
    compute_dtype: Any,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, "B S D"], Float[Array, ""]]:
    """(hidden states as `apply`'s, load-balancing loss of the experts over the tokens `counted`; 0 without experts).

    Only with a `dropout_key`, in training, adapters drop their inputs.
    """
    begins = None if segment_ids is None else document_begins(segment_ids)
    lengths = None
    if any(rope.depends_on_length for rope in network.config.ropes):
        lengths = document_lengths(jnp.zeros_like(positions) if begins is None else begins, positions)
    outputs = network.module(weights)(
        tokens,
        positions,
        Visible(begins),
        jnp.dtype(compute_dtype),
        lengths=lengths,
        counted=counted,
        dropout_key=dropout_key,
    )
    balance = jnp.zeros((), jnp.float32)
    if outputs.balance is not None:
        total = jnp.asarray(tokens.size, jnp.float32) if counted is None else counted.sum()
        balance = load_balancing_loss(outputs.balance, total)
    return outputs.hidden, balance


def logits(
    network: Network, weights: Tree, hidden: Float[Array, "*rows D"], *, compute_dtype: Any
) -> Float[Array, "*rows V"]:
    """Next-token logits over base and new rows, float32."""
    return network.module(weights).logits(hidden, jnp.dtype(compute_dtype))


def head_path(config: DecoderConfig) -> str:
    """The path of the table that makes the logits."""
    return "embed" if config.tie_word_embeddings else "head"
