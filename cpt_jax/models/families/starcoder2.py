"""StarCoder2: Llama with LayerNorm, biases, no gate, and a sliding window if asked for."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import NORMS, Names, config_of, read, standard_names

MODEL_TYPES = ("starcoder2",)
UNSUPPORTED = {"layer_types": (None,)}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    biased = bool(hf.use_bias)
    return config_of(
        hf,
        norm="layer",
        norm_epsilon=float(hf.norm_epsilon),
        gated=False,
        qkv_bias=biased,
        attention_out_bias=biased,
        mlp_bias=biased,
    )


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS, {"up": "c_fc", "down": "c_proj"})
