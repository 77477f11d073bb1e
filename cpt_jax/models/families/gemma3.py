"""Gemma 3, text: Gemma 2 with normalised queries and keys instead of soft caps, five windowed layers to each that sees
all, and another rotation in those."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import gemma, gemma2
from cpt_jax.models.families.schema import Names, attention_biases, config_of, read, standard_names

MODEL_TYPES = ("gemma3_text",)
# transformers reads the soft caps of attention and does not apply them.
UNSUPPORTED = gemma.UNSUPPORTED | {"attn_logit_softcapping": (None,)}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    return config_of(
        hf,
        activation=hf.hidden_activation,
        norm_offset=1.0,
        norm_placement="both",
        qk_norm="head",
        **attention_biases(hf),
        attention_scale=hf.query_pre_attn_scalar**-0.5,
        logit_softcap=hf.final_logit_softcapping,
        embedding_scale=hf.hidden_size**0.5,
    )


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, gemma2.NORMS)
