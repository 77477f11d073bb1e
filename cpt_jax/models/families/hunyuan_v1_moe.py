"""Hunyuan with experts (A13B): the dense one's attention; experts chosen by a softmax, and one that every token goes
through, with no weight."""

from typing import Any

from cpt_jax.core.errors import UserError
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.families import hunyuan_v1_dense
from cpt_jax.models.families.schema import (
    MLP,
    NORMS,
    Names,
    attention_names,
    experts_names,
    norm_names,
    outer_names,
    read,
    renamed,
)

MODEL_TYPES = ("hunyuan_v1_moe",)
_RENAMED = hunyuan_v1_dense.RENAMED | {".mlp.gate.": ".mlp.gate.wg."}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    experts = ExpertsConfig(
        count=hf.num_experts,
        per_token=_of_all_layers(hf.moe_topk),
        renormalise=True,
        balance_coefficient=0.0,
        shared_intermediate_size=hf.intermediate_size,
        shared_gate=False,
    )
    return hunyuan_v1_dense.config_of_read(hf, experts=experts)


def _of_all_layers(given: Any) -> int:
    """Of a number, or of one for each layer."""
    different = {given} if isinstance(given, int) else set(given)
    if len(different) != 1:
        raise UserError(f"config.json has moe_topk={given}: layers with different numbers of experts are not supported")
    return different.pop()


def layer_fields(config: DecoderConfig) -> dict[str, Any]:
    """One number for all layers, where a config.json has a list."""
    assert config.experts is not None
    return {"moe_topk": config.experts.per_token}


def weight_names(config: DecoderConfig) -> Names:
    names = outer_names(config)
    for layer in range(config.num_layers):
        names |= attention_names(config, layer) | norm_names(config, layer, NORMS)
        names |= experts_names(config, layer, "mlp", MLP, shared="shared_mlp")
    return renamed(names, _RENAMED)
