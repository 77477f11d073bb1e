"""MiniCPM3: keys, values and queries come from latents, as DeepSeek V2's; factors on embeddings, on what each block adds,
and on logits."""

import math
from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.deepseek_v3 import latent_attention
from cpt_jax.models.families.schema import NORMS, Names, config_of, read, standard_names

MODEL_TYPES = ("minicpm3",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    return config_of(
        hf,
        **latent_attention(hf, interleaved=False),
        mlp_bias=bool(hf.mlp_bias),
        embedding_scale=float(hf.scale_emb),
        residual_scale=hf.scale_depth / math.sqrt(hf.num_hidden_layers),
        logit_scale=hf.dim_model_base / hf.hidden_size,
    )


def layer_fields(config: DecoderConfig) -> dict[str, Any]:
    """The factor of what each block adds is said by the depth."""
    assert config.residual_scale is not None
    return {"scale_depth": config.residual_scale * math.sqrt(config.num_layers)}


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
