"""What the layers keep for the backward pass, on paper."""

from typing import NamedTuple

from cpt_jax.core.tree import flatten
from cpt_jax.models.attention import GlobalAttention
from cpt_jax.models.config import DENSE, SHARING, DecoderConfig, Mixer
from cpt_jax.models.decoder import Network
from cpt_jax.models.delta_net import DeltaNetConfig
from cpt_jax.models.latent_attention import LatentAttentionConfig
from cpt_jax.models.lone_feed_forward import LoneExpertsConfig, LoneFeedForwardConfig
from cpt_jax.models.mamba2 import Mamba2Config
from cpt_jax.models.remat import Remat
from cpt_jax.models.short_conv import ShortConvConfig
from cpt_jax.models.side_by_side import SideBySideConfig
from cpt_jax.sharding.hardware import backend

_MLP = ("mlp_gate", "mlp_up")


def activation_bytes(network: Network, begins: int, item: int, keys: int, tensor: int) -> float:
    """What the layers keep of a token, on one of the devices among which each is cut.

    Args:
      begins: the first layer that has a backward pass.
      item: bytes of a number in the compute type.
      keys: of which all weights of the softmax are kept; 0 where a kernel keeps a number a query.
    """
    config = network.config
    kinds = list(enumerate(config.kind_of_layer))[begins:]
    layers = [_Layer(kind.mixer_name, kind.mixer, config.section_of(number)) for number, kind in kinds]
    mixed = {layer: _mixed(network, layer, item, keys) for layer in layers}
    residual = _residual_bytes(config)
    # The residual stream is whole on each device.
    each = {layer: residual + (_layer_bytes(network, mixed[layer], layer, item) - residual) / tensor for layer in mixed}
    # What the layers are given besides is there from the first to the last.
    inputs = item * config.num_layers * (config.layer_input_size or 0) if layers else 0
    if config.remat is None:
        return inputs + sum(each[layer] for layer in layers)
    # Of each layer what is kept, and of one all, while its gradient is computed.
    kept = {layer: _bytes_with_remat(network, config.remat, mixed[layer], layer, item, tensor) for layer in mixed}
    return inputs + sum(kept[layer] for layer in layers) + max(each.values(), default=0)


class _Layer(NamedTuple):
    """What mixes tokens in a layer, by name; the stack that it is in."""

    name: str
    mixer: Mixer | None
    section: str

    def has(self, path: str) -> bool:
        """Whether a weight of the layers may be its own, but for others' mixers."""
        return self.section == next((name for name in (DENSE, SHARING) if f"/{name}/" in path), "")

    def routes(self, config: DecoderConfig) -> bool:
        """Whether it has experts."""
        alone = config.feed_forward or isinstance(self.mixer, LoneExpertsConfig)
        return config.experts is not None and self.section != DENSE and alone


class _Mixed(NamedTuple):
    """What mixing a token with others keeps, in bytes; the widths of what has a name, and of the products before."""

    kept: float
    named: dict[str, int]
    products: int


def _mixed(network: Network, layer: _Layer, item: int, keys: int) -> _Mixed:
    """See `models.remat.recomputed`."""
    config = network.config
    match mixer := layer.mixer:
        case DeltaNetConfig():
            # Projections, float32 those of decay and beta; what is mixed, and with its gate as the product takes it.
            inner = mixer.channels + mixer.values
            kept = item * (inner + 2 * mixer.values) + 8 * mixer.value_heads
            return _Mixed(kept, {"attention_out": mixer.values}, inner + 2 * mixer.value_heads)
        case LatentAttentionConfig():
            queries, values = config.num_heads * mixer.head_dim, config.num_heads * mixer.value_dim
            latents = {"kv_a": mixer.rank + mixer.rotated_dim} | ({"q_a": mixer.query_rank} if mixer.query_rank else {})
            kept = _attended(config, 2 * queries + values, values, item, keys) + _normed(network, layer, latents)
            named = {"queries": queries, "keys": queries, "values": values, "attention_out": values}
            products = queries + sum(latents.values()) + config.num_heads * (mixer.fixed_dim + mixer.value_dim)
            return _Mixed(kept, named, products)
        case LoneExpertsConfig() | LoneFeedForwardConfig():
            size = config.intermediate_size
            if isinstance(mixer, LoneExpertsConfig):
                size = (config.experts and config.experts.shared_intermediate_size) or 0
            products = size * (2 if config.gated else 1)
            return _Mixed(item * products, dict.fromkeys(_MLP, size), products)
        case Mamba2Config():
            # The same; the steps' projections are float32.
            inner = mixer.channels + mixer.values
            kept = item * (inner + 2 * mixer.values) + 4 * mixer.heads
            return _Mixed(kept, {"attention_out": mixer.values}, inner + mixer.heads)
        case SideBySideConfig():
            parts = (layer._replace(mixer=part) for part in (None, mixer.mamba2))
            one, other = (_mixed(network, part, item, keys) for part in parts)
            named = {name: width + other.named.get(name, 0) for name, width in one.named.items()}
            # And what the first of the two gives; the second's is counted with other mixers'.
            return _Mixed(one.kept + other.kept, named, one.products + other.products + config.hidden_size)
        case ShortConvConfig():
            return _Mixed(item * 4 * config.hidden_size, {}, 3 * config.hidden_size)
    sizes = mixer if isinstance(mixer, GlobalAttention) else config
    queries, groups = (
        config.num_heads * sizes.head_dim,
        0 if layer.section == SHARING else sizes.num_kv_heads * sizes.head_dim,
    )
    values = 0 if isinstance(mixer, GlobalAttention) and mixer.values_are_keys else groups
    gate = {None: 0, "channel": queries, "head": config.num_heads}[config.attention_gate]
    normed = ({"q": queries, "k": groups} if config.qk_norm is not None else {}) | (
        {"v": values} if config.value_norm else {}
    )
    kept = _attended(config, queries + 2 * groups, queries, item, keys) + item * gate + _normed(network, layer, normed)
    named = {"queries": queries, "keys": groups, "values": groups, "attention_out": queries}
    return _Mixed(kept, named, queries + groups + values + gate)


def _attended(config: DecoderConfig, inputs: int, mixed: int, item: int, keys: int) -> float:
    """Queries, keys and values, so many numbers together; what the heads mix, as the kernel gives it and as the product
    takes it."""
    return item * (inputs + mixed) + (item * config.num_heads * keys if keys else 4 * (mixed + config.num_heads))


def _normed(network: Network, layer: _Layer, widths: dict[str, int]) -> float:
    """What norms are given, by the linears that they are behind: the products with the kernels, and those with the
    adapters' B."""
    adapted = [path for path in flatten(network.shapes) if path.endswith("/lora_b") and layer.has(path)]
    kept = 0.0
    for name, width in widths.items():
        kept += 4 * width * (2 if any(path.endswith(f"/{layer.name}/{name}/lora_b") for path in adapted) else 1)
    return kept


def _bytes_with_remat(network: Network, remat: Remat, mixed: _Mixed, layer: _Layer, item: int, tensor: int) -> float:
    """What a layer keeps of a token with rematerialisation: its input, and what is named."""
    config = network.config
    size = _feed_forward_size(config, layer)
    named = dict.fromkeys(_MLP, size) | mixed.named
    kept = item * sum(named.get(kept, 0) for kept in remat.keep)
    if remat.products:
        # Experts' products are none of these, and that of down is only added to the stream, if a shared one's is not weighted.
        inner = size * (2 if config.gated else 1)
        inner += config.hidden_size + 1 if _weighs_shared_expert(config, layer) else 0
        inner += 0 if config.layer_input_size is None else config.layer_input_size + config.hidden_size
        # So is that of what mixes, where it is alone.
        inner += config.hidden_size if config.feed_forward else 0
        outputs = mixed.products + inner + sum(_ranks(network, layer))
        kept += (4 if backend() == "cpu" else item) * outputs
    return 4 * config.hidden_size + kept / tensor


def _feed_forward_size(config: DecoderConfig, layer: _Layer) -> int:
    """The inner width of what every token goes through besides what mixes tokens: of experts in its place, the shared
    one's."""
    if not config.feed_forward:
        return 0
    if config.experts is not None and layer.routes(config) and config.experts_name == "mlp":
        return config.experts.shared_intermediate_size or 0
    return (layer.section == SHARING and config.sharing_intermediate_size) or config.intermediate_size


def _weighs_shared_expert(config: DecoderConfig, layer: _Layer) -> bool:
    experts = config.experts if layer.routes(config) else None
    return experts is not None and experts.shared_intermediate_size is not None and experts.shared_gate


def _ranks(network: Network, layer: _Layer) -> list[int]:
    """Of the adapters of a layer."""
    others = {f"/{name}/" for name in network.config.layer_mixers if name != layer.name}
    paths = {path: leaf for path, leaf in flatten(network.shapes).items() if path.endswith("/lora_a")}
    return [
        leaf.shape[-1] for path, leaf in paths.items() if layer.has(path) and not any(other in path for other in others)
    ]


def _residual_bytes(config: DecoderConfig) -> int:
    """The residual stream of a token before attention and feed-forward, and before what is made of the layer's own
    input, float32."""
    parts = (1 if config.parallel_residual or not config.feed_forward else 2) + (config.layer_input_size is not None)
    return 4 * config.hidden_size * parts


def _layer_bytes(network: Network, mixed: _Mixed, layer: _Layer, item: int) -> float:
    """What one layer keeps of a token without rematerialisation."""
    config = network.config
    kept = _residual_bytes(config) + mixed.kept
    if config.norm_placement in ("after", "both"):
        kept += 8 * config.hidden_size
    kept += item * _feed_forward_size(config, layer) * (2 if config.gated else 1)
    if config.layer_input_size is not None:
        # The gate, and what the norm behind it is given.
        kept += item * config.layer_input_size + 4 * config.hidden_size
    if config.experts is not None and layer.routes(config):
        # Of each expert that a token goes through the inputs of gate and up, both of them, the product, rounded, and the
        # result; and the input of the router, and of the shared one.
        read, inner = config.experts.latent_size or config.hidden_size, 2 if config.gated else 1
        of_expert = (4 * inner + item) * config.expert_size + (4 + inner * item) * read
        inputs = 1 if config.experts.shared_intermediate_size is None else 2
        kept += config.experts.per_token * of_expert + 4 * inputs * config.hidden_size
        if config.experts.latent_size is not None:
            # Both of its products' inputs.
            kept += item * (config.hidden_size + read)
        if config.experts_name == "experts":
            # What both norms behind are given, and the experts' own input.
            kept += 4 * 3 * config.hidden_size
    if _weighs_shared_expert(config, layer):
        # What it gives, and its weight.
        kept += 4 * (config.hidden_size + 1)
    # Adapters: the products with A, float32, and rounded.
    return kept + (4 + item) * sum(_ranks(network, layer))
