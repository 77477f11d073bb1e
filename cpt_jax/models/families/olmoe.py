"""OLMoE: Llama with norms over whole projections of queries and keys, whose feed-forward is that of a few experts, chosen
by a router."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import MLP, Names, attention_biases, config_of, experts_of, mixture_names, read

MODEL_TYPES = ("olmoe",)
UNSUPPORTED = {"clip_qkv": (None,)}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    return config_of(hf, experts=experts_of(hf), qk_norm="projection", **attention_biases(hf))


def weight_names(config: DecoderConfig) -> Names:
    return mixture_names(config, "mlp", MLP)
