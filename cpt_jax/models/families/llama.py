"""Llama-architecture models (Llama 2, SmolLM, TinyLlama, ...): model_type "llama"."""

import dataclasses

from cpt_jax.core.errors import UserError
from cpt_jax.models.decoder import DecoderConfig

# What a config.json may ask for that this decoder does not do: field -> the values that ask for nothing.
UNSUPPORTED = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", None),
    "quantization_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a HF tensor belongs: our path, the layer it is of (None: of no layer), and whether it is stored
    transposed."""

    path: str
    layer: int | None = None
    transposed: bool = False


def config_from_hf(hf: dict) -> DecoderConfig:
    """Our configuration of a config.json.

    Raises:
      UserError: a field is missing, or asks for what is not supported.
    """
    for field, harmless in UNSUPPORTED.items():
        if hf.get(field) not in harmless:
            raise UserError(f"config.json has {field}={hf[field]!r}, which is not supported for this family")
    # transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters.
    rope = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or {}
    kind = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    if kind != "default":
        raise UserError(
            f"config.json asks for rope_scaling of type {kind!r}, which is not supported yet (only unscaled RoPE)"
        )
    try:
        heads, width = hf["num_attention_heads"], hf["hidden_size"]
        return DecoderConfig(
            vocab_size=hf["vocab_size"],
            hidden_size=width,
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or width // heads,
            rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0),
            rms_norm_eps=hf["rms_norm_eps"],
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            max_position_embeddings=hf["max_position_embeddings"],
        )
    except KeyError as error:
        raise UserError(f"config.json lacks the field {error.args[0]!r}: it is not a whole Llama config") from error


def config_to_hf(config: DecoderConfig, original: dict) -> dict:
    """The original config.json with the vocabulary's size as it is now."""
    return original | {"vocab_size": config.total_rows}


def weight_names(config: DecoderConfig) -> dict[str, Place]:
    """HF tensor name -> its place with us; tables are whole there (base and new rows in one)."""
    names = {"model.embed_tokens.weight": Place("embed"), "model.norm.weight": Place("final_norm/scale")}
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = Place("head")
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        for name in ("q", "k", "v", "o"):
            names[f"{prefix}.self_attn.{name}_proj.weight"] = Place(f"layers/attention/{name}/kernel", layer, True)
        for name in ("gate", "up", "down"):
            names[f"{prefix}.mlp.{name}_proj.weight"] = Place(f"layers/mlp/{name}/kernel", layer, True)
        names[f"{prefix}.input_layernorm.weight"] = Place("layers/attention_norm/scale", layer)
        names[f"{prefix}.post_attention_layernorm.weight"] = Place("layers/mlp_norm/scale", layer)
    return names
