"""Kernels for NVIDIA GPUs: cuDNN's fused attention, and tokamax's (Pallas, Mosaic GPU)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cpt_jax.models.kernels.visible import Visible, first_visible, mask
from cpt_jax.models.products import sum_type
from cpt_jax.sharding.hardware import compute_capability

# For how many documents a row cuDNN's packed attention is compiled where that is not said: of the work that it starts,
# most leaves again at once, and it keeps a sum for each document, head and token.
DOCUMENTS = (16, 64)


def cudnn(
    q: Float[Array, "B H S h"],
    k: Float[Array, "B G S h"],
    v: Float[Array, "B G S v"],
    visible: Visible,
    window: int | None,
    documents: int | None,
    dtype: jnp.dtype,
) -> Float[Array, "B H S v"]:
    """Packed documents are given to cuDNN as such (Hopper and later): at most `documents` a row; where that is not
    known, the device looks how many there are. With a window, on older GPUs, and where a row has more than the last
    of `DOCUMENTS`, a mask [B, 1, S, S] of `dtype` is added to the scores. Heads are filled up with zeros to one width: it
    takes values of another from Hopper and cuDNN 9.10 on."""
    values, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    q, k, v = (
        jnp.pad(each.astype(dtype), ((0, 0), (0, 0), (0, 0), (0, width - each.shape[-1]))).transpose(0, 2, 1, 3)
        for each in (q, k, v)
    )
    if visible.begins is None:
        within = None if window is None else (window - 1, 0)
        mixed = jax.nn.dot_product_attention(
            q, k, v, scale=1.0, is_causal=True, local_window_size=within, implementation="cudnn"
        )
    else:
        mixed = _documents(q, k, v, visible._replace(kind=0), window, documents)
    return mixed[..., :values].transpose(0, 2, 1, 3).astype(sum_type(dtype))


def _documents(q, k, v, visible: Visible, window: int | None, documents: int | None) -> Float[Array, "B S H h"]:
    # Made again in the backward pass, so that no mask is kept.
    @jax.checkpoint
    def masked(q, k, v):
        first, places = first_visible(visible, (window,), q.shape[0], q.shape[1])
        seen: Bool[Array, "B S K"] = mask(first, places, jnp.arange(k.shape[1]))
        return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], scale=1.0, implementation="cudnn")

    # cuDNN's packed layout has no windows.
    if window is not None or (compute_capability() or 0) < 9:
        return masked(q, k, v)
    assert visible.begins is not None
    starts = visible.begins == jnp.arange(visible.begins.shape[1])[None]
    if documents is not None:
        return _packed(*document_table(starts, documents), q, k, v)
    programs = [functools.partial(_packed, *document_table(starts, most)) for most in DOCUMENTS]
    number = jnp.searchsorted(jnp.asarray(DOCUMENTS), starts.sum(1).max())
    return jax.lax.switch(number, [*programs, masked], q, k, v)


def document_table(starts: Bool[Array, "B S"], most: int) -> tuple[Int[Array, "B M"], Int[Array, "B M+1"]]:
    """(lengths, first places) of each row's documents, -1 behind the last; right for rows that have at most `most`."""
    length = starts.shape[1]
    first = jax.vmap(lambda row: jnp.nonzero(row, size=most + 1, fill_value=length)[0])(starts).astype(jnp.int32)
    here = first < length
    return jnp.where(here[:, :-1], jnp.diff(first), -1), jnp.where(here, first, -1).at[:, -1].set(-1)


def _packed(lengths, first, q, k, v) -> Float[Array, "B S H h"]:
    """Not in JAX's public interface (`tests/models/test_attention_programs.py` would tell if it changed)."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    if jax.__version_info__ < (0, 11, 1):
        # Before, the places of keys were counted in the queries' heads (jax 0.11.0, fused_attention_stablehlo.py).
        k, v = (jnp.repeat(each, q.shape[2] // k.shape[2], axis=2) for each in (k, v))
    return fused.dot_product_attention(
        q, k, v, None, None, lengths, lengths, first, first, mask_type=fused.MaskType.PADDING_CAUSAL
    )  # type: ignore[return-value]


def tokamax(
    q: Float[Array, "B H S h"],
    k: Float[Array, "B G S h"],
    v: Float[Array, "B G S v"],
    visible: Visible,
    windows: tuple[int | None, ...],
    softcap: float | None,
    dtype: jnp.dtype,
) -> Float[Array, "B H S v"]:
    """Takes documents, windows and soft caps: each query is given its first key."""
    # What `tokamax.ops.gpu` names, which wants jax-triton besides.
    from tokamax._src.ops.attention.base import Mask  # type: ignore[import-not-found]
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention  # type: ignore[import-not-found]

    first = None
    if visible.begins is not None or any(window is not None for window in windows):
        first = first_visible(visible, windows, q.shape[0], q.shape[2])[0][:, None]
    q, k, v = (each.astype(dtype).transpose(0, 2, 1, 3) for each in (q, k, v))
    seen = Mask(is_causal=True, k_start=first)
    mixed = PallasMosaicGpuFlashAttention()(q, k, v, logits_scale=1.0, mask=seen, logits_soft_cap=softcap)
    return mixed.transpose(0, 2, 1, 3).astype(sum_type(dtype))
