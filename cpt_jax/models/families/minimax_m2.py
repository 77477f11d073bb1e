"""MiniMax M2: norms over whole projections of queries and keys, a part of each head rotated; experts in every layer, chosen by
sigmoids with a correction bias."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.families import mixtral, routed
from cpt_jax.models.families.schema import Names, config_of, read, renamed
from cpt_jax.models.router import RouterConfig

MODEL_TYPES = ("minimax_m2",)
_BIAS = {"block_sparse_moe.gate.e_score_correction_bias": "block_sparse_moe.e_score_correction_bias"}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, {})
    experts = ExpertsConfig(
        count=hf.num_local_experts,
        per_token=hf.num_experts_per_tok,
        renormalise=True,
        balance_coefficient=routed.balance_coefficient(hf),
        router=RouterConfig(scores="sigmoid", correction_bias=True),
    )
    return config_of(hf, partly_rotated=True, experts=experts, qk_norm="projection")


def weight_names(config: DecoderConfig) -> Names:
    return renamed(mixtral.weight_names(config), _BIAS)
