"""The kernel for TPUs: splash attention, of JAX's Pallas kernels."""

from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Float

from cpt_jax.models.kernels.visible import SAVED, Visible
from cpt_jax.models.products import sum_type

LANES = 128


def block_sizes(length: int) -> splash_kernel.BlockSizes:
    """The largest blocks up to 512 that divide the row: the usual setting for heads of 64 to 256 on v4 and v5."""
    block = next(size for size in (512, 384, 256, LANES) if length % size == 0)
    return splash_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )


def splash(
    q: Float[Array, "B H S h"],
    k: Float[Array, "B G S h"],
    v: Float[Array, "B G S h"],
    visible: Visible,
    window: int | None,
    softcap: float | None,
    dtype: jnp.dtype,
    *,
    interpret: bool = False,
) -> Float[Array, "B H S h"]:
    """Blocks outside the window are skipped; documents are compared within each block. The heads of a group read the
    same keys."""
    heads, length = q.shape[1:3]
    shape = (length, length)
    one = splash_mask.CausalMask(shape) if window is None else splash_mask.LocalMask(shape, (window - 1, 0), 0)
    kernel = splash_kernel.make_splash_mha(
        splash_mask.MultiHeadMask([one] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=block_sizes(length),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    q, k, v = (each.astype(dtype) for each in (q, k, v))
    documents = None if visible.begins is None else splash_kernel.SegmentIds(visible.begins, visible.begins)
    mixed = cast(Array, jax.vmap(kernel)(q, k, v, documents))
    return mixed.astype(sum_type(dtype))
