"""Depthwise convolution over a document's last tokens, as hybrids have it before or in the place of attention."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from cpt_jax.models.kernels.visible import Visible, first_visible


def causal_conv(
    x: Float[Array, "B S C"],
    kernel: Float[Array, "C 1 K"],
    visible: Visible,
    state: Float[Array, "B before C"] | None = None,
) -> tuple[Float[Array, "B S C"], Float[Array, "B before C"]]:
    """y[t] = sum over d < K of kernel[K - 1 - d] * x[t - d], of tokens of t's own document; and the last K - 1 inputs,
    which are the `state` of the call that goes on.

    The kernel is as torch has it, one an input channel. Padding before a document gives zeros.
    """
    (batch, length, channels), size = x.shape, kernel.shape[-1]
    before = jnp.zeros((batch, size - 1, channels), x.dtype) if state is None else state.astype(x.dtype)
    row = jnp.concatenate([before, x], axis=1)
    first, places = first_visible(visible, (None,), batch, length)
    taps = kernel[:, 0].T.astype(x.dtype)
    y = jnp.zeros_like(x)
    for back in range(size):
        seen = (places - back >= first)[..., None]
        start = size - 1 - back
        y += jnp.where(seen, row[:, start : start + length], 0) * taps[start][None, None]
    return y, row[:, length:]
