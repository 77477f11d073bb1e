"""Mixtral: Mistral whose feed-forward is that of a few experts, chosen by a router."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.families.schema import Names, config_of, mixture_names, read

MODEL_TYPES = ("mixtral",)


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    experts = ExpertsConfig(
        count=hf.num_local_experts,
        per_token=hf.num_experts_per_tok,
        renormalise=True,
        balance_coefficient=float(hf.router_aux_loss_coef),
    )
    return config_of(hf, experts=experts)


def weight_names(config: DecoderConfig) -> Names:
    return mixture_names(config, "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"})
