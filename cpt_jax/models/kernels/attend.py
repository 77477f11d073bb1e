"""Attention by whichever kernel, on one device or on each device of a mesh by itself."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from cpt_jax.models.kernels.blocks import blocks
from cpt_jax.models.kernels.choice import AttentionChoice, Work, kernel_for, within_rows
from cpt_jax.models.kernels.reference import reference
from cpt_jax.models.kernels.visible import SAVED, Visible
from cpt_jax.sharding.hardware import backend
from cpt_jax.sharding.rules import partition_spec

Windows = tuple[int | None, ...]


def attend(
    q: Float[Array, "B H S h"],
    k: Float[Array, "B G K h"],
    v: Float[Array, "B G K h"],
    visible: Visible,
    *,
    windows: Windows,
    softcap: float | None,
    dtype: jnp.dtype,
    kernel: AttentionChoice = "auto",
    documents: int | None = None,
) -> Float[Array, "B H S h"]:
    """softmax(q k) v, inputs rounded to `dtype`, result float32; query head i reads key head i * G // H.

    Args:
      windows: of the kinds of layers (see `Visible`).
      softcap: scores become softcap * tanh(scores / softcap).
      kernel: see `kernel_for`, also for what it raises.
      documents: no row has more; a kernel may give wrong results for rows that do.
    """
    length = q.shape[2]
    work = Work(
        backend=backend(),
        length=length,
        head_dim=q.shape[3],
        windows=windows,
        softcap=softcap,
        dtype=jnp.dtype(dtype),
    )
    name = kernel_for(kernel, work)
    if name == "xla":
        return checkpoint_name(reference(q, k, v, visible, windows, softcap, work.dtype), SAVED)
    run = functools.partial(_run, name, within_rows(windows, length), softcap, documents, work.dtype)
    return _on_each_device(run, q, k, v, visible)


def _on_each_device(run: Callable[..., Array], q, k, v, visible: Visible) -> Array:
    """`run`, by each device on its rows and heads: the compiler cannot cut a Pallas kernel, and blocks are skipped by
    what a device has. All heads are on every device where the key heads do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(q, k, v, visible)
    heads = partition_spec(("batch", "heads", "sequence", "hidden"), k.shape, mesh)
    whole, rows = PartitionSpec(), PartitionSpec(heads[0])
    specs = Visible(None if visible.begins is None else rows, whole, whole)  # type: ignore[arg-type]
    visible = visible._replace(kind=jnp.asarray(visible.kind), index=jnp.asarray(visible.index))
    cut = jax.shard_map(run, in_specs=(heads, heads, heads, specs), out_specs=heads, check_vma=False)
    return cut(q, k, v, visible)


def _run(
    name: str, windows: Windows, softcap: float | None, documents: int | None, dtype: jnp.dtype, q, k, v, visible
) -> Array:
    """One device's part."""
    if name == "blocks":
        return blocks(q, k, v, visible, windows, softcap, dtype)
    if name == "tokamax":
        from cpt_jax.models.kernels.gpu import tokamax

        return checkpoint_name(tokamax(q, k, v, visible, windows, softcap, dtype), SAVED)
    return _by_window(_static_kernel(name, softcap, documents, dtype), windows, q, k, v, visible)


def _static_kernel(name: str, softcap: float | None, documents: int | None, dtype: jnp.dtype) -> Callable[..., Array]:
    """A kernel that has to know its window when it is compiled. Imported where it is used: Pallas's kernels take half a
    second."""
    if name == "splash":
        from cpt_jax.models.kernels.tpu import splash

        return functools.partial(splash, softcap=softcap, dtype=dtype)
    from cpt_jax.models.kernels.gpu import cudnn

    def kernel(*args, window: int | None) -> Array:
        return checkpoint_name(cudnn(*args, window=window, documents=documents, dtype=dtype), SAVED)

    return kernel


def _by_window(kernel: Callable[..., Array], windows: Windows, q, k, v, visible: Visible) -> Any:
    """The kernel with the window of the layer's kind."""
    different = list(dict.fromkeys(windows))
    if len(different) == 1:
        return kernel(q, k, v, visible, window=different[0])
    calls = [lambda *args, window=window: kernel(*args, window=window) for window in different]
    number = jnp.asarray([different.index(window) for window in windows])[visible.kind]
    return jax.lax.switch(number, calls, q, k, v, visible)
