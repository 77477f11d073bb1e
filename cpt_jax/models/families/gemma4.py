"""Gemma 4, text: Gemma 3 whose layers that see all have heads of another size, of which a part turns and whose values
may be their keys; values are normalised too, norms' scales are whole, and each layer has a constant factor. In the
small ones (E2B, E4B) each layer has an input of its own, and the last ones take keys and values of those before; 26B-A4B
has experts beside each feed-forward."""

from typing import Any

from cpt_jax.core.errors import UserError
from cpt_jax.models.attention import GlobalAttention
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.families import gemma2
from cpt_jax.models.families.schema import (
    MLP,
    Names,
    Place,
    attention_biases,
    attention_names,
    config_of,
    each_expert,
    linear,
    mlp_names,
    norm_names,
    outer_names,
    read,
    stack_of,
)

MODEL_TYPES = ("gemma4_text", "gemma4_unified_text")
UNSUPPORTED = {
    # "vision" is about what is seen alone.
    "use_bidirectional_attention": (None, False, "vision"),
}
# Experts lie in files as transformers has them in memory.
STACKED = True
_NORMS_OF_EXPERTS = {
    "dense_out_norm": "post_feedforward_layernorm_1",
    "experts_norm": "pre_feedforward_layernorm_2",
    "experts_out_norm": "post_feedforward_layernorm_2",
}
# What files hold of layers that share keys and values, and transformers does not read.
_UNREAD = ("k_proj", "v_proj", "k_norm", "v_norm")
_OF_LAYERS = {"head_dim", "num_key_value_heads"}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    inputs, sharing = getattr(hf, "hidden_size_per_layer_input", 0), getattr(hf, "num_kv_shared_layers", 0)
    if inputs and hf.vocab_size_per_layer_input != hf.vocab_size:
        raise UserError(
            f"config.json has vocab_size_per_layer_input={hf.vocab_size_per_layer_input} (the default is 262144) beside "
            f"vocab_size={hf.vocab_size}, which is not supported for model_type {hf.model_type}: both are looked up by the same tokens"
        )
    experts = None
    if getattr(hf, "enable_moe_block", False):
        experts = ExpertsConfig(
            count=hf.num_experts,
            per_token=hf.top_k_experts,
            renormalise=True,
            balance_coefficient=0.0,
            intermediate_size=hf.moe_intermediate_size,
            beside=True,
        )
    whole = _of_type(raw, hf, "full_attention")
    sizes = GlobalAttention(
        head_dim=whole.head_dim,
        num_kv_heads=whole.num_key_value_heads,
        values_are_keys=bool(hf.attention_k_eq_v),
    )
    return config_of(
        _of_type(raw, hf, "sliding_attention") if "sliding_attention" in hf.layer_types else whole,
        mixers={"full_attention": sizes},
        activation=hf.hidden_activation,
        norm_placement="both",
        qk_norm="head",
        value_norm=True,
        layer_scalar=True,
        experts=experts,
        layer_input_size=inputs or None,
        sharing_layers=sharing,
        sharing_intermediate_size=2 * hf.intermediate_size if sharing and hf.use_double_wide_mlp else None,
        **attention_biases(hf),
        attention_scale=1.0,
        logit_softcap=hf.final_logit_softcapping,
        embedding_scale=hf.hidden_size**0.5,
    )


def _of_type(raw: dict, hf: Any, layer_type: str) -> Any:
    """The config of all layers of a type.

    Raises:
      UserError: they differ, or something that is not supported differs.
    """
    for fields in (raw.get("per_layer_config") or {}).values():
        if others := sorted(fields.keys() - _OF_LAYERS):
            raise UserError(
                f"config.json has {others[0]!r} in per_layer_config, which is not supported for model_type {hf.model_type}"
            )
    try:
        return hf.per_layer_config[layer_type]
    except ValueError as error:
        raise UserError(
            f"config.json's layers of type {layer_type} have different heads in per_layer_config, which is not supported"
        ) from error


def layer_fields(config: DecoderConfig) -> dict[str, Any]:
    """What a config.json says of its layers besides `layer_types`."""
    sizes = {
        str(number): kind.mixer
        for number, kind in enumerate(config.kind_of_layer)
        if isinstance(kind.mixer, GlobalAttention)
    }
    fields = {n: {"head_dim": of.head_dim, "num_key_value_heads": of.num_kv_heads} for n, of in sizes.items()}
    return {"per_layer_config": fields}


def weight_names(config: DecoderConfig) -> Names:
    names = outer_names(config)
    if config.layer_input_size is not None:
        outer = {
            "embed_tokens_per_layer": Place("layer_embed"),
            "per_layer_model_projection": Place("layer_inputs/projection/kernel", (), True),
            "per_layer_projection_norm": Place("layer_inputs/norm/scale"),
        }
        names |= {f"model.{name}.weight": (place,) for name, place in outer.items()}
    for layer in range(config.num_layers):
        names |= (
            attention_names(config, layer) | mlp_names(config, layer, MLP) | norm_names(config, layer, gemma2.NORMS)
        )
        prefix = f"model.layers.{layer}"
        if config.experts is not None:
            names |= norm_names(config, layer, _NORMS_OF_EXPERTS) | _experts_names(config, layer)
        path, number = stack_of(config, layer, "layer_scalar")
        names[f"{prefix}.layer_scalar"] = (Place(path, (number,)),)
        if config.layer_input_size is not None:
            path, number = stack_of(config, layer, "layer_input")
            names |= linear(f"{prefix}.per_layer_input_gate", f"{path}/input_gate", number, False)
            names |= linear(f"{prefix}.per_layer_projection", f"{path}/projection", number, False)
            names[f"{prefix}.post_per_layer_input_norm.weight"] = (Place(f"{path}/norm/scale", (number,)),)
    return names


def _experts_names(config: DecoderConfig, layer: int) -> Names:
    prefix, path, index = f"model.layers.{layer}", "layers/experts", (layer,)
    names: Names = {
        f"{prefix}.router.proj.weight": (Place(f"{path}/router", index, True),),
        f"{prefix}.router.scale": (Place(f"{path}/router_scale", index),),
        f"{prefix}.router.per_expert_scale": (Place(f"{path}/expert_scale", index),),
    }
    return names | each_expert(config, layer, f"{prefix}.experts", path, MLP)


def unread(config: DecoderConfig) -> tuple[str, ...]:
    """How the tensors begin that files may hold, and that go along as they are."""
    layers = range(config.num_layers - config.sharing_layers, config.num_layers)
    return tuple(f"model.layers.{layer}.self_attn.{name}." for layer in layers for name in _UNREAD)
