"""Command R7B, Command A and Tiny Aya: attention and feed-forward side by side behind one LayerNorm without bias, scaled
logits, neighbours rotated against each other; three of four layers see a window, the fourth does not rotate."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import cohere
from cpt_jax.models.families.schema import Names, config_of, read

MODEL_TYPES = ("cohere2",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    rotated = [kind == "sliding_attention" for kind in hf.layer_types]
    return config_of(hf, rotated=rotated, **cohere.differences(hf))


def weight_names(config: DecoderConfig) -> Names:
    return cohere.weight_names(config)
