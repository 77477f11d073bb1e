"""OLMoE: Llama with norms over whole projections of queries and keys, whose feed-forward is that of a few experts, chosen
by a router."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.families.schema import MLP, Names, config_of, mixture_names, read

MODEL_TYPES = ("olmoe",)
UNSUPPORTED = {"clip_qkv": (None,)}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    biased = bool(hf.attention_bias)
    experts = ExpertsConfig(
        count=hf.num_experts,
        per_token=hf.num_experts_per_tok,
        renormalise=bool(hf.norm_topk_prob),
        balance_coefficient=float(hf.router_aux_loss_coef),
    )
    return config_of(hf, experts=experts, qk_norm="projection", qkv_bias=biased, attention_out_bias=biased)


def weight_names(config: DecoderConfig) -> Names:
    return mixture_names(config, "mlp", MLP)
