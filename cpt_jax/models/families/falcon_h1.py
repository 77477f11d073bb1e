"""Falcon-H1: attention and Mamba 2 side by side in each layer, with factors of all their parts, of the feed-forward's gate
and result, of embeddings and of logits."""

from typing import Any

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import granitemoehybrid
from cpt_jax.models.families.schema import MLP, Names, attention_biases, config_of, read, renamed, standard_names
from cpt_jax.models.side_by_side import SideBySideConfig

MODEL_TYPES = ("falcon_h1",)
# PEFT has no adapters of these (tuners_utils.py, _check_lora_target_modules_mamba).
NOT_ADAPTED = ("out_proj",)
UNSUPPORTED = {"hidden_act": ("silu", "swish")}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "pre_ff_layernorm"}
_RENAMED = {".mlp.": ".feed_forward.", "model.norm.": "model.final_layernorm."}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    gate, down = hf.mlp_multipliers
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    return config_of(
        hf,
        mixers={"hybrid": _side_by_side(hf)},
        **attention_biases(hf),
        mlp_bias=bool(hf.mlp_bias),
        embedding_scale=float(hf.embedding_multiplier),
        # That of keys, which turn as they are scaled.
        attention_scale=head_dim**-0.5 * float(hf.key_multiplier),
        gate_scale=float(gate),
        down_scale=float(down),
        logit_scale=float(hf.lm_head_multiplier),
    )


def _side_by_side(hf: Any) -> SideBySideConfig:
    gate, v, k, q, step = map(float, hf.ssm_multipliers)
    placement = "before gate" if hf.mamba_norm_before_gate else "behind gate"
    mamba2 = granitemoehybrid.mamba2(
        hf,
        out_bias=bool(hf.projectors_bias),
        norm=placement if hf.mamba_rms_norm else None,
        factors=(gate, v, k, q, step),
    )
    return SideBySideConfig(
        mamba2=mamba2,
        attention_factors=(float(hf.attention_in_multiplier), float(hf.attention_out_multiplier)),
        mamba2_factors=(float(hf.ssm_in_multiplier), float(hf.ssm_out_multiplier)),
    )


def weight_names(config: DecoderConfig) -> Names:
    names = standard_names(config, NORMS, MLP)
    for layer in range(config.num_layers):
        names |= granitemoehybrid.mamba2_names(config, layer)
    return renamed(names, _RENAMED)
