"""Gemma 2: scaled embeddings, norms with 1 + scale before and after, soft caps, a window in every other layer."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import gemma
from cpt_jax.models.families.schema import Names, attention_biases, config_of, read, standard_names

MODEL_TYPES = ("gemma2",)
NORMS = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, gemma.UNSUPPORTED)
    return config_of(
        hf,
        activation=hf.hidden_activation,
        norm_offset=1.0,
        norm_placement="both",
        **attention_biases(hf),
        attention_scale=hf.query_pre_attn_scalar**-0.5,
        attention_softcap=hf.attn_logit_softcapping,
        logit_softcap=hf.final_logit_softcapping,
        embedding_scale=hf.hidden_size**0.5,
    )


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
