"""Gemma 4, text, dense: Gemma 3 whose layers that see all have heads of another size, of which a part turns and whose
values may be their keys; values are normalised too, norms' scales are whole, and each layer has a constant factor."""

from collections.abc import Sequence
from typing import Any

from cpt_jax.core.errors import UserError
from cpt_jax.models.attention import GlobalAttention
from cpt_jax.models.config import DecoderConfig, LayerKind
from cpt_jax.models.families import gemma2
from cpt_jax.models.families.schema import Names, Place, attention_biases, config_of, read, standard_names

MODEL_TYPES = ("gemma4_text", "gemma4_unified_text")
UNSUPPORTED = {
    # "vision" is about what is seen alone.
    "use_bidirectional_attention": (None, False, "vision"),
    "enable_moe_block": (None, False),
    "num_kv_shared_layers": (None, 0),
    "use_double_wide_mlp": (None, False),
}
_OF_LAYERS = {"head_dim", "num_key_value_heads"}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    if inputs := getattr(hf, "hidden_size_per_layer_input", 0):
        raise UserError(
            f"config.json has hidden_size_per_layer_input={inputs} (the default is 256), which is not supported for "
            f"model_type {hf.model_type}: inputs of each layer (Gemma 4 E2B and E4B) are a second vocabulary"
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


def layer_fields(kinds: Sequence[LayerKind]) -> dict[str, Any]:
    """What a config.json says of its layers besides `layer_types`."""
    sizes = {str(number): kind.mixer for number, kind in enumerate(kinds) if isinstance(kind.mixer, GlobalAttention)}
    fields = {n: {"head_dim": of.head_dim, "num_key_value_heads": of.num_kv_heads} for n, of in sizes.items()}
    return {"per_layer_config": fields}


def weight_names(config: DecoderConfig) -> Names:
    names = standard_names(config, gemma2.NORMS)
    for layer in range(config.num_layers):
        names[f"model.layers.{layer}.layer_scalar"] = (Place("layers/layer_scalar", (layer,)),)
    return names
