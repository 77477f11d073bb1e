"""Qwen3-Next: as Qwen3.5, with linear attention's projections interleaved by key heads, and with experts in the place of
each feed-forward."""

from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.delta_net import DeltaNetConfig
from cpt_jax.models.families import qwen3_5
from cpt_jax.models.families.schema import Names, consecutive, experts_of, fused, read

MODEL_TYPES = ("qwen3_next",)
BESIDE = qwen3_5.BESIDE
UNSUPPORTED = qwen3_5.UNSUPPORTED | {"decoder_sparse_step": (1,), "mlp_only_layers": (None, [])}


def config_from_hf(raw: dict) -> DecoderConfig:
    hf = read(raw, UNSUPPORTED)
    return qwen3_5.hybrid(hf, experts=experts_of(hf), intermediate_size=hf.moe_intermediate_size)


def weight_names(config: DecoderConfig) -> Names:
    return qwen3_5.hybrid_names(config, _projections)


def _projections(prefix: str, path: str, number: int, sizes: DeltaNetConfig) -> Names:
    keys, heads = sizes.key_dim, sizes.value_heads // sizes.key_heads
    values = heads * sizes.value_dim
    qkvz = {f"{path}/q": keys, f"{path}/k": keys, f"{path}/v": values, f"{path}/gate": values}
    ba = {f"{path}/beta": heads, f"{path}/decay": heads}
    names = fused(f"{prefix}.in_proj_qkvz", consecutive(qkvz), number, False)
    return names | fused(f"{prefix}.in_proj_ba", consecutive(ba), number, False)
