"""Granite 4.0-H: in most layers Mamba 2 in the place of attention, which mostly turns nothing by positions; Granite's four
multipliers; beside a feed-forward that every token goes through a few experts, chosen by a router, or none."""

from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.families.granite import multipliers
from cpt_jax.models.families.schema import (
    NORMS,
    Names,
    Place,
    Rows,
    attention_biases,
    attention_names,
    config_of,
    consecutive,
    fused,
    linear,
    norm_names,
    outer_names,
    read,
)
from cpt_jax.models.mamba2 import Mamba2Config
from cpt_jax.models.side_by_side import SideBySideConfig

MODEL_TYPES = ("granitemoehybrid",)
EXPERTS = "block_sparse_moe.experts"
# The convolution's activation too is `hidden_act`.
UNSUPPORTED = {"hidden_act": ("silu", "swish"), "position_embedding_type": (None, "nope", "rope")}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    experts = experts_of(hf, hf.shared_intermediate_size) if hf.num_local_experts else None
    return config_of(
        hf,
        rotated=[hf.position_embedding_type == "rope"] * hf.num_hidden_layers,
        mixers={"linear_attention": mamba2(hf)},
        experts=experts,
        intermediate_size=hf.shared_intermediate_size if experts is None else hf.intermediate_size,
        **multipliers(hf),
        **attention_biases(hf),
    )


def mamba2(hf: Any, **differences: Any) -> Mamba2Config:
    """Of a config as transformers reads it, with what is different in this family."""
    low, high = hf.time_step_limit or (0.0, float("inf"))
    common = dict(
        heads=hf.mamba_n_heads,
        groups=hf.mamba_n_groups,
        head_dim=hf.mamba_d_head,
        state_size=hf.mamba_d_state,
        kernel_size=hf.mamba_d_conv,
        conv_bias=bool(hf.mamba_conv_bias),
        bias=bool(hf.mamba_proj_bias),
        out_bias=bool(hf.mamba_proj_bias),
        step_limits=(float(low), float(high)),
    )
    return Mamba2Config(**common | differences)


def experts_of(hf: Any, shared: int | None) -> ExpertsConfig:
    """With one of width `shared` for every token. A softmax over the chosen logits alone is the whole one, renormalised."""
    return ExpertsConfig(
        count=hf.num_local_experts,
        per_token=hf.num_experts_per_tok,
        renormalise=True,
        balance_coefficient=float(hf.router_aux_loss_coef),
        shared_intermediate_size=shared,
        shared_gate=False,
    )


def layer_fields(config: DecoderConfig) -> dict[str, Any]:
    """`layer_types` as its makers write them."""
    return {"layer_types": ["attention" if kind.attends else "mamba" for kind in config.kind_of_layer]}


def weight_names(config: DecoderConfig) -> Names:
    names = outer_names(config)
    for layer, kind in enumerate(config.kind_of_layer):
        names |= attention_names(config, layer) if kind.attends else mamba2_names(config, layer)
        names |= norm_names(config, layer, NORMS) | _feed_forward_names(config, layer)
    return names


def mamba2_names(config: DecoderConfig, layer: int) -> Names:
    """Those of a layer with Mamba 2."""
    kind = config.kind_of_layer[layer]
    prefix, path, sizes = f"model.layers.{layer}.mamba", f"layers/{kind.mixer_name}", kind.mixer
    if isinstance(sizes, SideBySideConfig):
        path, sizes = f"{path}/mamba2", sizes.mamba2
    assert isinstance(sizes, Mamba2Config)
    number = config.layers_with(kind.mixer_name).index(layer)
    widths = {"gate": sizes.values, "v": sizes.values, "k": sizes.keys, "q": sizes.keys, "step": sizes.heads}
    parts = consecutive({f"{path}/{name}": width for name, width in widths.items()})
    names = fused(f"{prefix}.in_proj", parts, number, sizes.bias)
    names |= linear(f"{prefix}.out_proj", f"{path}/o", number, sizes.out_bias)
    others = {"conv1d.weight": "conv", "dt_bias": "step_bias", "A_log": "a_log", "D": "skip"}
    others |= {"conv1d.bias": "bias"} if sizes.conv_bias else {}
    others |= {"norm.weight": "norm/scale"} if sizes.norm is not None else {}
    return names | {f"{prefix}.{theirs}": (Place(f"{path}/{ours}", (number,)),) for theirs, ours in others.items()}


def _feed_forward_names(config: DecoderConfig, layer: int) -> Names:
    prefix, experts = f"model.layers.{layer}", config.experts
    path, inner = "layers/mlp", config.intermediate_size
    if experts is not None:
        path, inner = "layers/mlp/shared", experts.shared_intermediate_size
    if inner is None:
        return _experts_names(config, layer)
    parts = consecutive({f"{path}/gate": inner, f"{path}/up": inner})
    names = fused(f"{prefix}.shared_mlp.input_linear", parts, layer, False)
    names |= linear(f"{prefix}.shared_mlp.output_linear", f"{path}/down", layer, False)
    return names if experts is None else names | _experts_names(config, layer)


def _experts_names(config: DecoderConfig, layer: int) -> Names:
    """The router, and the experts as two stacks."""
    assert config.experts is not None
    prefix, inner, count = f"model.layers.{layer}.block_sparse_moe", config.intermediate_size, config.experts.count
    first, second = Rows(2 * inner, 0, inner), Rows(2 * inner, inner, 2 * inner)

    def place(name: str, expert: int, rows: Rows | None = None) -> Place:
        return Place(f"layers/mlp/{name}/kernel", (layer, expert), True, rows, expert)

    outer = [part for n in range(count) for part in (place("gate", n, first), place("up", n, second))]
    return {
        f"{prefix}.router.layer.weight": (Place("layers/mlp/router", (layer,), True),),
        f"{prefix}.input_linear.weight": tuple(outer),
        f"{prefix}.output_linear.weight": tuple(place("down", n) for n in range(count)),
    }
