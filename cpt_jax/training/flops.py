"""Model FLOPs of a training step: what its result takes, whatever the program does besides (recomputation, the other
half of causal attention's scores)."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from cpt_jax.core.tree import flatten
from cpt_jax.models.attention import GlobalAttention
from cpt_jax.models.config import DecoderConfig, Mixer
from cpt_jax.models.decoder import Network, abstract_decoder, head_path
from cpt_jax.models.delta_net import DeltaNetConfig
from cpt_jax.models.latent_attention import LatentAttentionConfig
from cpt_jax.models.linear import ADAPTER_LEAVES
from cpt_jax.models.lone_feed_forward import LoneExpertsConfig, LoneFeedForwardConfig
from cpt_jax.models.mamba2 import Mamba2Config
from cpt_jax.models.short_conv import ShortConvConfig
from cpt_jax.models.side_by_side import SideBySideConfig


class TokenFlops(NamedTuple):
    """FLOPs a token, by what they are for: the forward pass, the gradient of activations and that of weights, and a
    teacher's forward pass."""

    forward: float
    activations: float
    weights: float
    teacher: float

    @property
    def total(self) -> float:
        return sum(self)


def token_flops(
    network: Network,
    trains: Callable[[str], bool],
    sequence_length: int,
    *,
    teacher: Literal["average", "start"] | None = None,
) -> TokenFlops:
    """Model FLOPs a token of a step on rows of `sequence_length`.

    A product of [n, i] and [i, o] counts 2 n i o: once forward, once for the gradient of its input, if anything before
    it trains, and once for that of its weight, if it trains; what mixes tokens as `mixing_flops` says, and twice that
    backward. Experts count as many as a token goes through. Norms, rotations and softmax are not counted
    (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

    Args:
      teacher: "average" runs the same network once more, "start" the one without adapters, over the base's vocabulary.
    """
    config = network.config
    layers, head, inputs = _by_layer(network), _head_products(config), _input_products(network)
    mixing = mixing_flops(config, sequence_length)
    paths = flatten(network.shapes)
    begins = first_to_train(network, trains)
    forward = sum(sum(layer.values()) for layer in [inputs, *layers]) + sum(mixing) + sum(head.values())
    # A layer below which, and in which, nothing trains has no backward pass.
    activations = sum(
        sum(layer.values()) + 2 * mixed
        for number, (layer, mixed) in enumerate(zip(layers, mixing, strict=True))
        if number >= begins
    )
    if any(trains(path) for path in paths if not path.startswith(f"{head_path(config)}/")) or begins < len(layers):
        activations += sum(head.values())
    if any(trains(path) for path in paths if path.startswith("embed/")):
        activations += sum(inputs.values())
    products = [head, inputs, *layers]
    weights = sum(flops for layer in products for path, flops in layer.items() if trains(path))
    taught = 0.0
    if teacher is not None:
        base = network if teacher == "average" else abstract_decoder(config)
        parts = (
            head if teacher == "average" else {path: flops for path, flops in head.items() if path.endswith("/base")}
        )
        taught = sum(sum(layer.values()) for layer in [inputs, *_by_layer(base)]) + sum(mixing) + sum(parts.values())
    return TokenFlops(forward, activations, weights, taught)


def _by_layer(network: Network) -> list[dict[str, float]]:
    """Of each layer, the FLOPs of one token's forward products by the weight's path."""
    config = network.config
    groups = [(f"layers/{name}/", count) for name, count in config.layer_groups] or [("layers/", config.num_layers)]
    share = 1.0 if config.experts is None else config.experts.per_token / config.experts.count
    found: list[dict[str, float]] = []
    for prefix, count in groups:
        layers: list[dict[str, float]] = [{} for _ in range(count)]
        for path, leaf in flatten(network.shapes).items():
            if path.startswith(prefix) and path.endswith(("/kernel", "/router", *ADAPTER_LEAVES[:2])):
                _, *shape = leaf.shape
                for number in config.layers_with(path.removeprefix(prefix)):
                    if len(found) <= number < len(found) + count:
                        one = layers[number - len(found)]
                        one[path] = 2.0 * math.prod(shape) * (share if len(shape) == 3 else 1.0)
        found += layers
    return found


def _head_products(config: DecoderConfig) -> dict[str, float]:
    return {f"{head_path(config)}/{name}": 2.0 * rows * config.hidden_size for name, rows in config.table_rows.items()}


def _input_products(network: Network) -> dict[str, float]:
    """What makes the layers' own inputs."""
    products = {
        path: leaf for path, leaf in flatten(network.shapes).items() if path == "layer_inputs/projection/kernel"
    }
    return {path: 2.0 * leaf.size for path, leaf in products.items()}


def mixing_flops(config: DecoderConfig, length: int) -> list[float]:
    """Of each layer, the FLOPs of mixing a token with others, weights' products apart.

    Attention counts the keys that a query may see in a row of one document, on average (length + 1) / 2 without a window
    (causal attention, halved), times 2 products. The gated delta rule counts those of its recurrence, 3 with a state,
    Mamba 2 its 2. Convolutions are not counted.
    """
    attention = attention_flops(config, length)
    return [attended + _state_flops(kind.mixer) for attended, kind in zip(attention, config.kind_of_layer, strict=True)]


def attention_flops(config: DecoderConfig, length: int) -> list[float]:
    """Those of attention: 0 of a layer without."""
    found = []
    for kind in config.kind_of_layer:
        window = min(kind.window or length, length)
        # The first `window` queries see 1, 2, ... keys, the others `window`.
        keys = (window * (window + 1) / 2 + (length - window) * window) / length
        widths = sum(config.heads_of(kind)[:2])
        found.append(2.0 * config.num_heads * widths * keys if kind.attends else 0.0)
    return found


def _state_flops(mixer: Mixer | None) -> float:
    match mixer:
        case DeltaNetConfig():
            return 6.0 * mixer.values * mixer.key_dim
        case Mamba2Config():
            return 4.0 * mixer.values * mixer.state_size
        case SideBySideConfig():
            return _state_flops(mixer.mamba2)
        case (
            None
            | GlobalAttention()
            | LatentAttentionConfig()
            | LoneExpertsConfig()
            | LoneFeedForwardConfig()
            | ShortConvConfig()
        ):
            return 0.0


def first_to_train(network: Network, trains: Callable[[str], bool]) -> int:
    """The number of the first layer that needs a backward pass: of the first that has a weight that trains, or 0 where
    the inputs' tables do."""
    config, paths = network.config, list(flatten(network.shapes))
    if any(trains(path) for path in paths if path.startswith(("embed/", "layer_embed/", "layer_inputs/"))):
        return 0
    groups = [(f"layers/{name}/", count) for name, count in config.layer_groups] or [("layers/", config.num_layers)]
    first = 0
    for prefix, count in groups:
        if any(trains(path) for path in paths if path.startswith(prefix)):
            return first
        first += count
    return first
