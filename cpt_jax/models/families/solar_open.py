"""Solar Open: GLM-4.5's experts in every layer, whole heads rotated."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import routed
from cpt_jax.models.families.schema import Names, config_of, read

MODEL_TYPES = ("solar_open",)


def config_from_hf(raw: dict) -> DecoderConfig:
    # No feed-forward has this width: transformers writes no such field.
    hf = read({"intermediate_size": 0} | raw, {})
    return config_of(
        hf,
        experts=routed.experts_of(hf, hf.n_routed_experts, hf.n_shared_experts),
        intermediate_size=hf.moe_intermediate_size,
        qkv_bias=bool(hf.attention_bias),
    )


def weight_names(config: DecoderConfig) -> Names:
    return routed.weight_names(config)
