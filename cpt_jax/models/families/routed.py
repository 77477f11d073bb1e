"""What families have in common that route as DeepSeek-V3 does: sigmoid scores with a correction bias, groups, a shared
expert without a gate, and first layers without experts."""

from collections.abc import Mapping, Sequence
from typing import Any

from cpt_jax.core.errors import UserError
from cpt_jax.models.config import DENSE, DecoderConfig
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.families.schema import (
    MLP,
    NORMS,
    Names,
    attention_names,
    experts_names,
    mlp_names,
    norm_names,
    outer_names,
)
from cpt_jax.models.router import RouterConfig


def experts_of(hf: Any, count: int, shared: int) -> ExpertsConfig:
    """Of so many experts, and with one as wide as `shared` of them for every token."""
    return ExpertsConfig(
        count=count,
        per_token=hf.num_experts_per_tok,
        renormalise=bool(hf.norm_topk_prob),
        balance_coefficient=balance_coefficient(hf),
        shared_intermediate_size=shared * hf.moe_intermediate_size or None,
        shared_gate=False,
        intermediate_size=hf.moe_intermediate_size,
        router=RouterConfig(
            scores="sigmoid",
            correction_bias=True,
            groups=hf.n_group,
            chosen_groups=hf.topk_group,
            epsilon=1e-20,
            scale=float(hf.routed_scaling_factor),
        ),
    )


def balance_coefficient(hf: Any) -> float:
    """None where the config.json says nothing: the bias balances these."""
    return float(getattr(hf, "router_aux_loss_coef", None) or 0.0)


def dense_first(has_experts: Sequence[bool], field: str) -> int:
    """The number of the first layers without experts, by the `field` that says which have some.

    Raises:
      UserError: there are others behind.
    """
    dense = next((layer for layer, each in enumerate(has_experts) if each), len(has_experts))
    if not all(has_experts[dense:]):
        raise UserError(
            f"config.json's {field} has layers without experts behind such with them, which is not supported"
        )
    return dense


def weight_names(config: DecoderConfig) -> Names:
    """Those of a family that is written as Llama is, but for experts."""
    names = outer_names(config)
    for layer in range(config.num_layers):
        names |= attention_names(config, layer) | norm_names(config, layer, NORMS)
        names |= feed_forward_names(config, layer, MLP)
    return names


def feed_forward_names(config: DecoderConfig, layer: int, matrices: Mapping[str, str]) -> Names:
    """Of a layer, with experts or without."""
    if config.experts is None or config.section_of(layer) == DENSE:
        return mlp_names(config, layer, matrices)
    return experts_names(config, layer, "mlp", matrices, shared="shared_experts")


def next_tokens(config: DecoderConfig) -> tuple[str, ...]:
    """What predicts several tokens, which lies behind the last layer, and which transformers does not read."""
    return (f"model.layers.{config.num_layers}.",)
