"""StableLM: Llama with LayerNorm, a quarter of each head rotated, biases on queries, keys and values if asked for, and
attention and feed-forward behind one norm, side by side, if asked for."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import cohere
from cpt_jax.models.families.schema import NORMS, Names, config_of, read, standard_names

MODEL_TYPES = ("stablelm",)
UNSUPPORTED = {"qk_layernorm": (None, False)}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    return config_of(
        hf,
        norm="layer",
        norm_epsilon=float(hf.layer_norm_eps),
        qkv_bias=bool(hf.use_qkv_bias),
        parallel_residual=bool(hf.use_parallel_residual),
        shared_norm=bool(hf.use_parallel_residual),
    )


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, cohere.NORMS if config.shared_norm else NORMS)
