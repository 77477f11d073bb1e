"""Llama 2 and 3, SmolLM, TinyLlama, InternLM3, ...: the architecture that the others are described against."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import NORMS, Names, attention_biases, config_of, read, standard_names

MODEL_TYPES = ("llama", "internlm3")
UNSUPPORTED = {"layer_types": (None,)}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    return config_of(hf, **attention_biases(hf), mlp_bias=bool(hf.mlp_bias))


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
