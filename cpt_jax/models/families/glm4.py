"""GLM-4-0414 and GLM-Z1: norms before and after, biases on queries, keys and values, the first half of each head rotated,
neighbours against each other, and the two inner projections stored in one tensor."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import (
    Names,
    attention_names,
    config_of,
    fused_mlp_names,
    norm_names,
    outer_names,
    read,
)

MODEL_TYPES = ("glm4",)
NORMS = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_out_norm": "post_mlp_layernorm",
}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    return config_of(hf, norm_placement="both", interleaved_rotation=True, qkv_bias=bool(hf.attention_bias))


def weight_names(config: DecoderConfig) -> Names:
    names = outer_names(config)
    for layer in range(config.num_layers):
        names |= attention_names(config, layer) | fused_mlp_names(config, layer) | norm_names(config, layer, NORMS)
    return names
