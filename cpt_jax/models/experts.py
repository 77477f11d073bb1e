"""Mixture of experts: each token's feed-forward is that of the few experts its router chooses, and of a shared expert,
if there is one.

No token is dropped, so that the result is that of the released models. Experts are spread over the mesh axis
"expert": each device gathers the tokens of its row of that axis, computes its own experts' share, and the shares are
added and scattered back.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from cpt_jax.core.errors import UserError
from cpt_jax.models.feed_forward import FeedForward
from cpt_jax.models.linear import ACTIVATIONS, Linear, LoRAConfig, Weight, adapter, initial_kernel
from cpt_jax.models.norms import unit_rms
from cpt_jax.models.products import grouped_matmul, matmul
from cpt_jax.models.quantised import OfStack, own_layer
from cpt_jax.models.remat import recomputed
from cpt_jax.models.router import RouterConfig
from cpt_jax.sharding.mesh import AXES
from cpt_jax.sharding.rules import RULES, parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClampedSwiGLU:
    """gate * sigmoid(alpha * gate) * (up + 1), gates cut off above `limit` and ups beyond it on both sides (gpt-oss:
    OpenAI 2025, arXiv 2508.10925)."""

    alpha: float
    limit: float

    def __call__(self, gate: Float[Array, "N i"], up: Float[Array, "N i"]) -> Float[Array, "N i"]:
        gate = jnp.minimum(gate, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (jnp.clip(up, -self.limit, self.limit) + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """`per_token` of `count` experts serve a token, chosen and weighted as the `router` says; `renormalise` makes the
    chosen weights sum to 1. `balance_coefficient` weighs the load-balancing loss in training. `shared_intermediate_size`: the
    width of an expert that serves every token besides (Dai et al. 2024, arXiv 2401.06066), if `shared_gate` weighted by a
    sigmoid (Qwen2-MoE: Yang et al. 2024, arXiv 2407.10671); None: there is none. `intermediate_size`: the width of each
    expert (None: the decoder's). `beside`: they stand beside a feed-forward (Gemma 4), with scales of the router's input
    and of each expert, not in its place. `latent_size`: each expert reads and writes so many numbers of a token, which two
    linears make of the hidden state and back (Nemotron 3 Super); None: the hidden state itself. `bias`: router and experts
    have biases. `swiglu`: what takes the place of activation(gate) * up."""

    count: int
    per_token: int
    renormalise: bool
    balance_coefficient: float
    shared_intermediate_size: int | None = None
    shared_gate: bool = True
    intermediate_size: int | None = None
    beside: bool = False
    latent_size: int | None = None
    router: RouterConfig = RouterConfig()
    bias: bool = False
    swiglu: ClampedSwiGLU | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.count:
            raise UserError(f"num_experts_per_tok {self.per_token} is not between 1 and the {self.count} experts")
        if self.shared_intermediate_size is not None and self.shared_intermediate_size < 1:
            raise UserError(f"shared_expert_intermediate_size is {self.shared_intermediate_size}: give at least 1")
        if self.latent_size is not None and (self.beside or self.latent_size < 1):
            raise UserError(f"moe_latent_size is {self.latent_size}: give at least 1, in the place of a feed-forward")
        self.router.check(self.count, self.per_token)


class Balance(NamedTuple):
    """What one layer's router did (or all layers', with a leading axis): how often each expert was chosen, and the sum
    of its probabilities, over the tokens counted."""

    chosen: Float[Array, "E"]
    probability: Float[Array, "E"]


def load_balancing_loss(balance: Balance, counted: Float[Array, ""]) -> Float[Array, ""]:
    """E * sum over experts of (share of tokens) * (mean probability), over all layers (Fedus et al. 2021, arXiv
    2101.03961, equations 4 to 6); `per_token` when the load is even.

    Args:
      balance: of all layers [L, E].
      counted: tokens counted.
    """
    layers, experts = balance.chosen.shape
    total = layers * jnp.maximum(counted, 1.0)
    return experts * jnp.sum(balance.chosen.sum(0) * balance.probability.sum(0)) / total**2


class ExpertLinear(nnx.Module):
    """One matrix an expert [E, i, o], with its optional bias [E, o] and adapters."""

    def __init__(
        self, path: str, axes: tuple[str, ...], shape: tuple[int, ...], lora: LoRAConfig | None, rngs, bias: bool
    ) -> None:
        self.kernel = Weight(initial_kernel(rngs, shape), logical_axes=axes)
        self.bias = Weight(jnp.zeros((shape[0], shape[2])), logical_axes=(axes[0], axes[2])) if bias else None
        self.adapter = lora.adapter(path) if lora is not None else None
        if self.adapter is not None:
            for field in ("dora", "dropout"):
                if getattr(self.adapter, field):
                    raise UserError(
                        f"LoRA on experts has no {field}: leave it out, or take 'layers/attention/*' as targets"
                    )
            self.lora_a, self.lora_b = adapter(self.adapter.rank, axes, shape, rngs)

    def weights(self) -> dict[str, Any]:
        """Its arrays by name."""
        names = (
            "kernel",
            *(("bias",) if self.bias is not None else ()),
            *(("lora_a", "lora_b") if self.adapter is not None else ()),
        )
        return {name: getattr(self, name).get_value() for name in names}

    def axes(self, name: str) -> tuple[str, ...]:
        """The logical axes of one of its arrays."""
        return getattr(self, name).get_metadata("logical_axes")

    def divides(self, weights: dict[str, Any], axis: str, parts: int) -> bool:
        """Whether its arrays (quantised or not) can be cut along an axis; of scales there may be one along it."""
        leaves = [(self.axes(name), leaf) for name, array in weights.items() for leaf in jax.tree.leaves(array)]
        sizes = [leaf.shape[axes.index(axis)] for axes, leaf in leaves if axis in axes]
        return max(sizes) % parts == 0 and all(size == 1 or size % parts == 0 for size in sizes)

    def specs(self, weights: dict[str, Any], cut: dict[str, str]) -> dict[str, Any]:
        """How its arrays are cut while it computes: logical axes over the mesh axis they are given, if there is more
        than one scale along them; whole along the others."""

        def spec(name: str, array: Array) -> PartitionSpec:
            sizes = zip(self.axes(name), array.shape, strict=True)
            return PartitionSpec(*(cut.get(axis) if size > 1 else None for axis, size in sizes))

        return {name: jax.tree.map(functools.partial(spec, name), array) for name, array in weights.items()}


class Experts(nnx.Module):
    """The router and its experts, each of them down(activation(gate(x)) * up(x)), or with another product, or without a
    gate down(activation(up(x))); the shared one may be times sigmoid(shared_gate(x)). Beside a feed-forward the router reads
    x / rms(x) * router_scale / sqrt(D), and the chosen weights are multiplied by their experts' `expert_scale`."""

    def __init__(self, config, lora: LoRAConfig | None, rngs: nnx.Rngs) -> None:
        experts: ExpertsConfig = config.experts
        width, inner, count = config.hidden_size, config.expert_size, experts.count
        path, self.epsilon = f"layers/{config.experts_name}", config.norm_epsilon
        self.settings = experts
        self.activation = ACTIVATIONS[config.activation]
        # As in `FeedForward`.
        self.apart = config.layer_loop == "unroll" and config.remat is None
        self.router = Weight(initial_kernel(rngs, (width, count)), logical_axes=("embed", "router"))
        self.router_bias = Weight(jnp.zeros((count,)), logical_axes=("router",)) if experts.bias else None

        def linear(name: str, axes: tuple[str, ...], *sizes: int) -> ExpertLinear:
            return ExpertLinear(f"{path}/{name}", ("experts", *axes), (count, *sizes), lora, rngs, experts.bias)

        self.gated = config.gated
        read = experts.latent_size or width
        if self.gated:
            self.gate = linear("gate", ("embed", "mlp"), read, inner)
        self.up = linear("up", ("embed", "mlp"), read, inner)
        self.down = linear("down", ("mlp", "embed"), inner, read)
        if experts.latent_size is not None:
            into, back = (f"{path}/latent_in", ("embed", "router")), (f"{path}/latent_out", ("router", "embed"))
            self.latent_in = Linear(*into, (width, read), lora, rngs, config.mlp_bias)
            self.latent_out = Linear(*back, (read, width), lora, rngs, config.mlp_bias)
        if experts.router.correction_bias:
            self.correction_bias = Weight(jnp.zeros((count,)), logical_axes=("router",))
        if experts.beside:
            self.router_scale = Weight(jnp.ones((width,)), logical_axes=("hidden",))
            self.expert_scale = Weight(jnp.ones((count,)), logical_axes=("router",))
        if (size := experts.shared_intermediate_size) is not None:
            self.shared = FeedForward(config, lora, rngs, path=f"{path}/shared", intermediate_size=size)
            if experts.shared_gate:
                self.shared_gate = Linear(f"{path}/shared_gate", ("embed", "router"), (width, 1), lora, rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        dtype: jnp.dtype,
        counted: Float[Array, "B S"],
        norm: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "B S D"], Balance]:
        """What the experts make of x, or of what `norm` makes of it: the router reads x itself."""
        tokens, settings, router = x.reshape(-1, x.shape[-1]), self.settings, self.settings.router
        read = recomputed(self._scaled)(tokens) if settings.beside else tokens
        # The router is small, and a wrong choice is not: it computes in the residual's own type.
        logits = matmul(read, self.router[...], tokens.dtype)
        if self.router_bias is not None:
            logits += self.router_bias[...].astype(logits.dtype)[None]
        scores = router.scores_of(logits)
        bias = self.correction_bias[...] if router.correction_bias else None
        shares, chosen = router.choice(scores, bias, settings.per_token, settings.renormalise)
        if settings.beside:
            shares = shares * self.expert_scale[...].astype(shares.dtype)[chosen]
        if norm is not None:
            tokens = recomputed(norm)(x).reshape(tokens.shape)
        if settings.latent_size is not None:
            tokens = self.latent_in(x, dtype).reshape(-1, settings.latent_size)
        weight = counted.reshape(-1, 1)
        times = jax.nn.one_hot(chosen, settings.count, dtype=scores.dtype).sum(1)
        balance = Balance((times * weight).sum(0), (router.probabilities(scores) * weight).sum(0))
        linears = {"up": self.up, "down": self.down} | ({"gate": self.gate} if self.gated else {})
        weights = {name: linear.weights() for name, linear in linears.items()}
        # Of what devices with a part of the wide axis give, the sum is taken: down's bias is added once, behind it.
        last = weights["down"].pop("bias", None)
        scales = {name: linear.adapter.scale for name, linear in linears.items() if linear.adapter is not None}
        # Computed again, two numbers are kept of it, not five, or eight of the cut-off one.
        product = recomputed(settings.swiglu or functools.partial(_product, self.activation), apart=self.apart)
        compute = functools.partial(_computed, scales=scales, product=product, dtype=dtype)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            mixed = compute(tokens, chosen, shares, weights, first=0)
        else:
            rows = PartitionSpec(RULES["batch"], RULES["sequence"])
            # What is gathered from other devices is this layer's alone.
            weights = jax.tree.map(own_layer, weights, is_leaf=lambda leaf: isinstance(leaf, OfStack))
            # What does not divide stays whole, as `partition_spec` has it.
            cut = {
                axis: over
                for axis, over in (("experts", "expert"), ("mlp", "tensor"))
                if all(each.divides(weights[name], axis, mesh.shape[over]) for name, each in linears.items())
            }
            specs = {name: linear.specs(weights[name], cut) for name, linear in linears.items()}
            # Rows and tokens are filled up.
            missing = [-size % parts(mesh, axis) for size, axis in zip(x.shape[:2], ("batch", "sequence"), strict=True)]
            filling = ((0, missing[0]), (0, missing[1]), (0, 0))
            in_rows = [jnp.pad(part.reshape(*x.shape[:2], -1), filling) for part in (tokens, chosen, shares)]
            mixed = jax.shard_map(
                functools.partial(_spread, specs=(rows, specs), cut=tuple(cut.values()), compute=compute),
                in_specs=(rows, rows, rows, specs),
                out_specs=rows,
            )(in_rows[0], in_rows[1], in_rows[2], weights)[: x.shape[0], : x.shape[1]]
        if last is not None:
            each = jax.nn.one_hot(chosen, settings.count, dtype=shares.dtype)
            mixed = mixed.reshape(tokens.shape) + matmul((each * shares[..., None]).sum(1), last, shares.dtype)
        mixed = mixed.reshape(*x.shape[:2], -1)
        if settings.latent_size is not None:
            mixed = self.latent_out(mixed, dtype)
        if settings.shared_intermediate_size is not None:
            mixed += self._of_shared(x, dtype)
        return mixed, balance

    def _scaled(self, tokens: Float[Array, "N D"]) -> Float[Array, "N D"]:
        scale = self.router_scale[...].astype(tokens.dtype) * tokens.shape[-1] ** -0.5
        return unit_rms(tokens, self.epsilon) * scale[None]

    def _of_shared(self, x: Float[Array, "B S D"], dtype: jnp.dtype) -> Float[Array, "B S D"]:
        if not self.settings.shared_gate:
            return self.shared(x, dtype)
        share = recomputed(lambda x: jax.nn.sigmoid(self.shared_gate(x, dtype)))(x)
        return share * self.shared(x, dtype)


def _spread(tokens, chosen, shares, weights, *, specs, cut, compute):
    """On one device: all tokens of its row of the axis "expert", its own experts, its own part of the wide axis. Where
    experts are not `cut` over "expert", its own tokens, all experts; where the wide axis is not over "tensor", all of
    it, which the devices along that axis compute alike."""
    (rows, weight_specs), shape = specs, tokens.shape
    axes = tuple(axis for axis in AXES if axis != "tensor" or axis in cut)
    each = [part.reshape(-1, part.shape[-1]) for part in (tokens, chosen, shares)]
    if "expert" in cut:
        each = [jax.lax.all_gather(part, "expert", tiled=True) for part in each]
    each = [_varying(part, rows, axes) for part in each]
    weights = jax.tree.map(lambda array, spec: _varying(array, spec, axes), weights, weight_specs)
    own = weights["up"]["kernel"].shape[0]
    part = compute(*each, weights, first=jax.lax.axis_index("expert") * own if "expert" in cut else 0)
    if "tensor" in cut:
        part = jax.lax.psum(part, "tensor")
    if "expert" in cut:
        part = jax.lax.psum_scatter(part, "expert", tiled=True)
    return part.reshape(shape)


def _varying(array: Array, spec: PartitionSpec, axes: tuple[str, ...]) -> Array:
    """An array cut by `spec`, with its copies along the other mesh axes (of these) taken for different ones: each device
    makes its own share of the gradient, which is their sum."""
    cut = {axis for part in spec for axis in (part if isinstance(part, tuple) else (part,))}
    missing = tuple(axis for axis in axes if axis not in cut)
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def _product(activation, *inner: Array) -> Array:
    """activation(gate) * up, or activation(up)."""
    first, *rest = inner
    return activation(first) * rest[0] if rest else activation(first)


def _computed(
    tokens: Float[Array, "N D"],
    chosen: Int[Array, "N k"],
    shares: Float[Array, "N k"],
    weights: dict[str, dict[str, Any]],
    *,
    first: Int[Array, ""] | int,
    scales: dict[str, float],
    product: Callable[..., Array],
    dtype: jnp.dtype,
) -> Float[Array, "N D"]:
    """The share that experts `first`, `first` + 1, ... (as many as `weights` hold) have in each token's output."""
    own = weights["up"]["kernel"].shape[0]
    local = chosen.reshape(-1) - first
    group = jnp.where((local >= 0) & (local < own), local, own)
    # Sorted by expert; those of other devices' experts come last, and belong to no group.
    order = jnp.argsort(group, stable=True)
    sizes = jnp.bincount(group, length=own + 1)[:own].astype(jnp.int32)
    rows = tokens[order // chosen.shape[1]]

    def linear(name: str, x: Float[Array, "N i"]) -> Float[Array, "N o"]:
        matrices = weights[name]
        y = grouped_matmul(x, matrices["kernel"], sizes, dtype)
        if "bias" in matrices:
            # Of rows of other devices' experts, which are given some bias too, down's product makes zero.
            y += jnp.take(matrices["bias"], group[order], axis=0, mode="clip").astype(y.dtype)
        if "lora_a" in matrices:
            low = grouped_matmul(x, matrices["lora_a"], sizes, dtype) * scales[name]
            y += grouped_matmul(low, matrices["lora_b"], sizes, dtype)
        return y

    outputs = linear("down", product(*(linear(name, rows) for name in ("gate", "up") if name in weights)))
    outputs *= shares.reshape(-1)[order][:, None]
    return jnp.zeros(tokens.shape, outputs.dtype).at[order // chosen.shape[1]].add(outputs)
