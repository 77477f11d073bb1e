"""DeepSeek V3 and R1, Kimi K2, Moonlight: keys and values, and mostly queries, come from latents; experts are chosen by
sigmoids with a bias, in groups, in all but the first layers."""

from typing import Any

from cpt_jax.core.errors import UserError
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import routed
from cpt_jax.models.families.layer_kinds import yarn_magnitude
from cpt_jax.models.families.schema import Names, attention_biases, config_of, read
from cpt_jax.models.latent_attention import LatentAttentionConfig

MODEL_TYPES = ("deepseek_v3",)
# What transformers does not look at.
UNSUPPORTED = {"moe_layer_freq": (1,), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    dense = hf.first_k_dense_replace >= hf.num_hidden_layers
    return config_of(
        hf,
        **latent_attention(hf),
        experts=None if dense else routed.experts_of(hf, hf.n_routed_experts, hf.n_shared_experts),
        dense_layers=0 if dense else hf.first_k_dense_replace,
    )


def latent_attention(hf: Any, *, interleaved: bool | None = None) -> dict[str, Any]:
    """What `config_of` is given of these families; `interleaved` where their config.json does not say it."""
    if hf.num_key_value_heads != hf.num_attention_heads:
        raise UserError(
            f"num_key_value_heads is {hf.num_key_value_heads}: latents are expanded to keys for each of the {hf.num_attention_heads} heads"
        )
    sizes = LatentAttentionConfig(
        query_rank=hf.q_lora_rank,
        rank=hf.kv_lora_rank,
        fixed_dim=hf.qk_nope_head_dim,
        rotated_dim=hf.qk_rope_head_dim,
        value_dim=hf.v_head_dim,
    )
    scale, rotation = sizes.head_dim**-0.5, hf.rope_parameters
    # YaRN's factor on scores, which is not that on cosines and sines.
    if rotation["rope_type"] != "default" and (weight := rotation.get("mscale_all_dim")):
        scale *= yarn_magnitude(float(rotation.get("factor", 1)), weight) ** 2
    return attention_biases(hf) | {
        "mixers": {"full_attention": sizes},
        "head_dim": sizes.head_dim,
        "attention_scale": scale,
        "interleaved_rotation": bool(hf.rope_interleave) if interleaved is None else interleaved,
    }


def layer_fields(config: DecoderConfig) -> dict[str, Any]:
    """What a deeper model's config.json says of its layers: what predicts several tokens does not fit it."""
    dense = config.num_layers if config.experts is None else config.dense_layers
    return {"first_k_dense_replace": dense, "num_nextn_predict_layers": 0}


def weight_names(config: DecoderConfig) -> Names:
    return routed.weight_names(config)


def unread(config: DecoderConfig) -> tuple[str, ...]:
    return routed.next_tokens(config)
