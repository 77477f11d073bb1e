"""Gemma 1 and CodeGemma: Llama with scaled embeddings and norms of 1 + scale."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import NORMS, Names, attention_biases, config_of, read, standard_names

MODEL_TYPES = ("gemma",)
UNSUPPORTED = {"use_bidirectional_attention": (None, False)}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    return config_of(
        hf,
        norm_offset=1.0,
        **attention_biases(hf),
        embedding_scale=hf.hidden_size**0.5,
    )


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
