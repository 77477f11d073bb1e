"""Kernels for NVIDIA GPUs: cuDNN's fused attention, and the Pallas kernel that comes with JAX."""

from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.attention import mha
from jaxtyping import Array, Float

from cpt_jax.models.kernels.visible import Visible, first_visible, mask
from cpt_jax.models.products import sum_type


def cudnn(
    q: Float[Array, "B H S h"],
    k: Float[Array, "B G S h"],
    v: Float[Array, "B G S h"],
    visible: Visible,
    window: int | None,
    dtype: jnp.dtype,
) -> Float[Array, "B H S h"]:
    """Fused for rows that are one document each. Packed ones go in as a mask [B, 1, S, S] of `dtype`, which cuDNN adds
    to the scores, and for which it writes a gradient of the same size: its own packed layout wants to know beforehand
    how many documents a row has at most."""
    seen, within = None, None if window is None else (window - 1, 0)
    if visible.begins is not None:
        first, places = first_visible(visible._replace(kind=0), (window,), q.shape[0], q.shape[2])
        seen, within = mask(first, places, jnp.arange(k.shape[2]))[:, None], None
    q, k, v = (each.astype(dtype).transpose(0, 2, 1, 3) for each in (q, k, v))
    mixed = jax.nn.dot_product_attention(
        q, k, v, mask=seen, scale=1.0, is_causal=True, local_window_size=within, implementation="cudnn"
    )
    return mixed.transpose(0, 2, 1, 3).astype(sum_type(dtype))


def triton(
    q: Float[Array, "B H S h"],
    k: Float[Array, "B G S h"],
    v: Float[Array, "B G S h"],
    visible: Visible,
    window: int | None,
    dtype: jnp.dtype,
    *,
    interpret: bool = False,
) -> Float[Array, "B H S h"]:
    """Takes documents; each query head wants keys and values of its own."""
    assert window is None
    copies = q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(each.astype(dtype), copies, axis=1) for each in (k, v))
    q, k, v = (each.transpose(0, 2, 1, 3) for each in (q.astype(dtype), k, v))
    mixed = cast(Array, mha(q, k, v, visible.begins, causal=True, interpret=interpret))
    return mixed.transpose(0, 2, 1, 3).astype(sum_type(dtype))
