"""Sizes of a decoder, and how its blocks are made."""

import dataclasses
from typing import Literal, NamedTuple

from cpt_jax.core.errors import UserError
from cpt_jax.models.attention import GlobalAttention
from cpt_jax.models.delta_net import DeltaNetConfig
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.kernels.choice import AttentionChoice
from cpt_jax.models.latent_attention import LatentAttentionConfig
from cpt_jax.models.layer_groups import LayerGroups
from cpt_jax.models.linear import ACTIVATIONS, XIELU
from cpt_jax.models.lone_feed_forward import LoneExpertsConfig, LoneFeedForwardConfig
from cpt_jax.models.mamba2 import Mamba2Config
from cpt_jax.models.remat import Remat
from cpt_jax.models.rope import DynamicNTK, Rope, Yarn
from cpt_jax.models.short_conv import ShortConvConfig
from cpt_jax.models.side_by_side import SideBySideConfig

ATTENTION = "attention"
# The stacks of the first layers, which have no experts, and of those that take others' keys and values, within that of the
# layers.
DENSE, SHARING = "dense", "sharing"
# What else mixes tokens.
Mixer = (
    DeltaNetConfig
    | GlobalAttention
    | LatentAttentionConfig
    | LoneExpertsConfig
    | LoneFeedForwardConfig
    | Mamba2Config
    | ShortConvConfig
    | SideBySideConfig
)


class Heads(NamedTuple):
    """Widths of each head's keys (and queries) and values, and how many heads keys and values have."""

    keys: int
    values: int
    groups: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What layers may differ in: how far back a token sees (None: to its document's beginning), its rotation (None:
    positions are not told apart), and what mixes tokens (None: attention with the decoder's heads)."""

    rope: Rope | None
    window: int | None = None
    mixer: Mixer | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UserError(f"sliding_window is {self.window}: give at least 1")

    @property
    def attends(self) -> bool:
        """Whether attention mixes tokens."""
        return self.mixer is None or isinstance(self.mixer, GlobalAttention | LatentAttentionConfig | SideBySideConfig)

    @property
    def mixer_name(self) -> str:
        """The subtree of a layer's weights that mixes tokens."""
        return ATTENTION if self.mixer is None else self.mixer.name

    @property
    def layer_type(self) -> str:
        """As config.json's `layer_types` call it."""
        if self.mixer is not None:
            return self.mixer.layer_type
        return "full_attention" if self.window is None else "sliding_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder, and how its blocks are made. The vocabulary has `vocab_size` rows of the base's and
    `new_rows` behind them.

    Each of the two tables is padded to a multiple of `row_multiple`, as accelerators like it; padded rows are never
    predicted, and are not saved.

    Layer i is of kind `layer_kinds[layer_pattern[i]]`; without a pattern all are of the first. What mixes tokens is a
    stack of its own of as many layers as have it ("layers/attention", "layers/delta_net").

    `norm_placement`: of attention and feed-forward, the input is normalised ("before"), the output ("after"), or
    "both"; `attention_gate`: what the heads mix is multiplied by a sigmoid of the input, number by number ("channel"),
    or head by head; `value_norm`: values are divided by their root mean square, head by head; `layer_scalar`: what a
    layer gives is multiplied by a number of its own, which does not train; `layer_input_size`: each layer is also given
    so many numbers of each token, from a second vocabulary (see `layer_inputs`); `parallel_residual` adds both to the same
    input, with `shared_norm` behind the same norm. `norm_bias`: of
    "layer" norms. `qk_norm`: queries and keys are normalised head by head, or as whole projections, or head by head once they are rotated. `interleaved_rotation`: neighbouring
    numbers of a head are rotated against each other, not its halves. `attention_scale`
    (default: head_dim ** -0.5) multiplies queries; `attention_sinks`: each head has a score of nothing, which takes its share of
    the softmax. Soft caps are c * tanh(x / c), of attention scores and of logits.
    Without `feed_forward` a layer is what its kind says, alone. The `activation` "xielu" has weights of its own. `gate_scale` multiplies what the feed-forward's gate gives before its activation, `down_scale` its result,
    `residual_scale` what attention and feed-forward add to their input, `logit_scale` what the final norm
    gives, and so the logits, before their cap.

    The last `sharing_layers` have no keys and values: they take those of the last layer before them that has their
    heads. They are a stack of their own, "layers/sharing", whose feed-forward is `sharing_intermediate_size` wide
    (default: as the others').

    The first `dense_layers` have a feed-forward in the place of experts; they are a stack of their own, "layers/dense".

    `layer_loop`: "scan" compiles one layer; "unroll" compiles all of them, which takes several times as long and
    runs about a fifth faster on a CPU, a twentieth on a GPU. `remat`: what the backward pass recomputes (None: nothing). `attention`
    names the kernel (see `kernels.choice`); "auto" takes the best for the device, the rows and the type. `documents`:
    at most so many are packed into a row (None: not known). `runs`: the decoder may be mapped over runs.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_kinds: tuple[LayerKind, ...]
    layer_pattern: tuple[int, ...] | None = None
    new_rows: int = 0
    row_multiple: int = 1
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 2048
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-5
    norm_offset: float = 0.0
    norm_bias: bool = True
    norm_placement: Literal["before", "after", "both"] = "before"
    qk_norm: Literal["head", "projection", "rotated"] | None = None
    value_norm: bool = False
    attention_gate: Literal["channel", "head"] | None = None
    layer_scalar: bool = False
    layer_input_size: int | None = None
    sharing_layers: int = 0
    sharing_intermediate_size: int | None = None
    parallel_residual: bool = False
    shared_norm: bool = False
    interleaved_rotation: bool = False
    qkv_bias: bool = False
    attention_out_bias: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False
    feed_forward: bool = True
    gated: bool = True
    mlp_bias: bool = False
    activation: str = "silu"
    experts: ExpertsConfig | None = None
    dense_layers: int = 0
    gate_scale: float | None = None
    down_scale: float | None = None
    embedding_scale: float | None = None
    residual_scale: float | None = None
    logit_scale: float | None = None
    logit_softcap: float | None = None
    layer_groups: LayerGroups = ()
    layer_loop: Literal["scan", "unroll"] = "scan"
    remat: Remat | None = None
    attention: AttentionChoice = "auto"
    documents: int | None = None
    runs: bool = False

    def __post_init__(self) -> None:
        for groups in (self.heads_of(kind).groups for kind in self.layer_kinds):
            if self.num_heads % groups:
                raise UserError(f"num_attention_heads {self.num_heads} is no multiple of num_key_value_heads {groups}")
        if self.activation not in ACTIVATIONS and (self.activation != XIELU or self.gated or self.experts is not None):
            raise UserError(
                f"activation {self.activation!r} is not supported; supported: {', '.join(sorted(ACTIVATIONS))}"
            )
        if self.layer_pattern is not None and len(self.layer_pattern) != self.num_layers:
            raise UserError(f"layer_types names {len(self.layer_pattern)} layers, num_hidden_layers {self.num_layers}")
        if self.layer_groups and sum(count for _, count in self.layer_groups) != self.num_layers:
            raise UserError(f"layer_groups {self.layer_groups} do not have {self.num_layers} layers together")
        if self.sharing_layers and self.experts is not None:
            raise UserError("layers that take keys and values of others have no experts")
        if self.dense_layers and (self.experts is None or not 0 < self.dense_layers < self.num_layers):
            raise UserError(
                f"the first {self.dense_layers} of {self.num_layers} layers have no experts: the others must"
            )
        mixers, own = self.layer_mixers, self.num_layers - self.sharing_layers
        if lacking := [mixer for mixer in mixers[own:] if mixer not in mixers[:own]]:
            raise UserError(
                f"the last {self.sharing_layers} layers have no keys and values, and before them no layer has those of {lacking[0]}"
            )

    @property
    def kind_of_layer(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return tuple(self.layer_kinds[kind] for kind in self.layer_pattern or (0,) * self.num_layers)

    def heads_of(self, kind: LayerKind) -> Heads:
        """Of the attention of a kind of layers."""
        if isinstance(mixer := kind.mixer, LatentAttentionConfig):
            return Heads(mixer.head_dim, mixer.value_dim, self.num_heads)
        sizes = mixer if isinstance(mixer, GlobalAttention) else self
        return Heads(sizes.head_dim, sizes.head_dim, sizes.num_kv_heads)

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """The subtree of each layer's weights that mixes tokens."""
        return tuple(kind.mixer_name for kind in self.kind_of_layer)

    @property
    def sections(self) -> dict[str, range]:
        """The layers of each stack that is apart from the others, by its name; "": those of the others."""
        dense, own = self.dense_layers, self.num_layers - self.sharing_layers
        return {"": range(dense, own), DENSE: range(dense), SHARING: range(own, self.num_layers)}

    def section_of(self, layer: int) -> str:
        """The name of the stack that a layer is in."""
        return next(name for name, layers in self.sections.items() if layer in layers)

    def layers_with(self, inner: str) -> tuple[int, ...]:
        """The numbers of the layers that have a weight, by its path within a layer: those that the stack of it holds."""
        first, _, rest = inner.partition("/")
        section = first if first in (DENSE, SHARING) else ""
        part, mixers = rest.partition("/")[0] if section else first, self.layer_mixers
        return tuple(n for n in self.sections[section] if part not in mixers or mixers[n] == part)

    @property
    def experts_name(self) -> str | None:
        """The subtree of a layer's weights that holds its experts."""
        if self.experts is None:
            return None
        if not self.feed_forward:
            return LoneExpertsConfig.name
        return "experts" if self.experts.beside else "mlp"

    @property
    def expert_size(self) -> int:
        """The width of each expert."""
        return (self.experts and self.experts.intermediate_size) or self.intermediate_size

    @property
    def total_rows(self) -> int:
        """Tokens of both tables."""
        return self.vocab_size + self.new_rows

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The rotations of those kinds of layers that have one."""
        return tuple(kind.rope for kind in self.layer_kinds if kind.rope is not None)

    @property
    def context_length(self) -> int:
        """Tokens that the model was made to read: more than `max_position_embeddings` where theta grows with the text,
        and with YaRN, whose factor may be set beside it."""
        scalings = [rope.scaling for rope in self.ropes]
        found = [int(each.factor * each.original_length) for each in scalings if isinstance(each, DynamicNTK | Yarn)]
        return max(self.max_position_embeddings, *found, 0)

    def padded(self, rows: int) -> int:
        """Rows that a table of so many tokens has."""
        return -(-rows // self.row_multiple) * self.row_multiple

    @property
    def table_rows(self) -> dict[str, int]:
        """Tokens of each table by its name."""
        return {"base": self.vocab_size} | ({"new": self.new_rows} if self.new_rows else {})
