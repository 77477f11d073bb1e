"""Command R, Aya 23: attention and feed-forward side by side behind one LayerNorm without bias, scaled logits, neighbours
rotated against each other."""

from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families.schema import Names, attention_biases, config_of, read, standard_names

MODEL_TYPES = ("cohere",)
UNSUPPORTED = {"use_qk_norm": (None, False)}
NORMS = {"attention_norm": "input_layernorm"}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    return config_of(hf, **differences(hf))


def differences(hf: Any) -> dict[str, Any]:
    """What Cohere's models have in common."""
    return dict(
        norm="layer",
        norm_bias=False,
        norm_epsilon=float(hf.layer_norm_eps),
        parallel_residual=True,
        shared_norm=True,
        interleaved_rotation=True,
        **attention_biases(hf),
        logit_scale=float(hf.logit_scale),
    )


def weight_names(config: DecoderConfig) -> Names:
    return standard_names(config, NORMS)
