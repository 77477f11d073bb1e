"""LFM3: as LFM2, with windowed layers besides, whose rotation is another one; in the layers that see all a part of each
head turns; norms before and after, and a gate for each head if asked for."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import lfm2
from cpt_jax.models.families.schema import Names, attention_biases, config_of, read
from cpt_jax.models.short_conv import ShortConvConfig

MODEL_TYPES = ("lfm3",)
MODULES = {"self_attn.gate_proj": "self_attn.g_proj"}
OUT_NORMS = {"attention_out_norm": "post_operator_norm", "mlp_out_norm": "post_ffn_norm"}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    return config_of(
        hf,
        mixers={"conv": ShortConvConfig(kernel_size=hf.conv_L_cache, bias=bool(hf.conv_bias))},
        norm_epsilon=float(hf.norm_eps),
        norm_placement="both" if hf.use_sandwich_norm else "before",
        activation="silu",
        qk_norm="head",
        attention_gate="head" if hf.use_attention_gate else None,
        **attention_biases(hf),
    )


def weight_names(config: DecoderConfig) -> Names:
    return lfm2.names_of(config, lfm2.NORMS | (OUT_NORMS if config.norm_placement == "both" else {}))
