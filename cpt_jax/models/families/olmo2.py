"""OLMo 2: Llama with norms behind attention and feed-forward instead of before them, and over whole projections of
queries and keys."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import Names, attention_biases, config_of, read, standard_names

MODEL_TYPES = ("olmo2",)
NORMS = {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    return config_of(hf, norm_placement="after", qk_norm="projection", **attention_biases(hf))


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
