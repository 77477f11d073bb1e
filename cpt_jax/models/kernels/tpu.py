"""The kernel for TPUs: splash attention, of JAX's Pallas kernels."""

from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Float, Int

from cpt_jax.models.kernels.visible import SAVED
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


def splash_kernel_of(
    heads: int, length: int, window: int | None, softcap: float | None, context: int = 1, *, interpret: bool = False
) -> splash_kernel.SplashAttentionKernel:
    """For rows of `length` tokens, of which each of `context` devices has a part of the queries. Blocks outside the
    window are skipped; the heads of a group read the same keys."""
    shape = (length, length)
    one = splash_mask.CausalMask(shape) if window is None else splash_mask.LocalMask(shape, (window - 1, 0), 0)
    return splash_kernel.make_splash_mha(
        splash_mask.MultiHeadMask([one] * heads),
        head_shards=1,
        q_seq_shards=context,
        block_sizes=block_sizes(length // context),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )


def splash(
    kernel: splash_kernel.SplashAttentionKernel,
    q: Float[Array, "B H S h"],
    k: Float[Array, "B G K h"],
    v: Float[Array, "B G K v"],
    documents: tuple[Int[Array, "B S"], Int[Array, "B K"]] | None,
    dtype: jnp.dtype,
    sinks: Float[Array, "B H"] | None = None,
) -> Float[Array, "B H S v"]:
    """By one device's share of a kernel. Documents, of queries and of keys, are compared within each block."""
    q, k, v = (each.astype(dtype) for each in (q, k, v))
    # Their gradient is of the result's type, whatever theirs is.
    sinks = None if sinks is None else sinks.astype(dtype)
    ids = None if documents is None else splash_kernel.SegmentIds(*documents)
    mixed = cast(Array, jax.vmap(kernel)(q, k, v, ids, sinks))
    return mixed.astype(sum_type(dtype))
