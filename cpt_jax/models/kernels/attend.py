"""Attention by whichever kernel, on one device or on each device of a mesh by itself."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from cpt_jax.models.kernels.blocks import blocks
from cpt_jax.models.kernels.choice import AttentionChoice, Work, kernel_for, within_rows
from cpt_jax.models.kernels.reference import reference
from cpt_jax.models.kernels.runs import rows_of_runs
from cpt_jax.models.kernels.visible import SAVED, Visible
from cpt_jax.models.products import sum_type
from cpt_jax.sharding.hardware import backend, compute_capability
from cpt_jax.sharding.rules import RULES, partition_spec

Windows = tuple[int | None, ...]
(CONTEXT,) = RULES["sequence"]


class _Call(NamedTuple):
    """What is done, without the arrays: by which kernel, with which windows (of the kinds of layers), and so on."""

    kernel: str
    windows: Windows
    softcap: float | None
    documents: int | None
    dtype: jnp.dtype


def attend(
    q: Float[Array, "B H S h"],
    k: Float[Array, "B G K h"],
    v: Float[Array, "B G K v"],
    visible: Visible,
    *,
    windows: Windows,
    softcap: float | None,
    dtype: jnp.dtype,
    sinks: Float[Array, "H"] | None = None,
    kernel: AttentionChoice = "auto",
    documents: int | None = None,
    runs: bool = False,
) -> Float[Array, "B H S v"]:
    """softmax(q k) v, inputs rounded to `dtype`, result float32; query head i reads key head i * G // H.

    Args:
      windows: of the kinds of layers (see `Visible`).
      softcap: scores become softcap * tanh(scores / softcap).
      sinks: each head's score of a key that nobody sees and whose value is zero (gpt-oss; Xiao et al. 2023, arXiv
        2309.17453): a head may attend to nothing.
      kernel: see `kernel_for`, also for what it raises.
      documents: no row has more; a kernel may give wrong results for rows that do.
      runs: the call may be mapped over runs with `jax.vmap`, which only the reference bears without it.
    """
    length, mesh = q.shape[2], jax.sharding.get_abstract_mesh()
    work = Work(
        backend=backend(),
        capability=compute_capability(),
        length=length,
        head_dim=max(q.shape[3], v.shape[3]),
        windows=windows,
        softcap=softcap,
        dtype=jnp.dtype(dtype),
        context=1 if mesh.empty else mesh.shape[CONTEXT],
        sinks=sinks is not None,
    )
    # By rows, as the others are, which meshes cut and runs are mapped over.
    each = None if sinks is None else jnp.broadcast_to(sinks.astype(sum_type(work.dtype))[None], q.shape[:2])
    name = kernel_for(kernel, work)
    if name == "xla":
        return checkpoint_name(reference(q, k, v, visible, windows, softcap, work.dtype, each), SAVED)
    call = _Call(name, within_rows(windows, length), softcap, documents, work.dtype)
    if mesh.empty or mesh.size == 1:
        attention = functools.partial(_on_one_device, call)
    else:
        attention = functools.partial(_on_each_device, call, mesh)
    if runs:
        return checkpoint_name(rows_of_runs(attention)(q, k, v, each, visible), SAVED)
    return attention(q, k, v, each, visible)


def _on_one_device(call: _Call, q, k, v, sinks, visible: Visible) -> Array:
    return _part(call, _splash_kernels(call, q.shape[1], q.shape[2]), q, k, v, sinks, visible)


def _on_each_device(call: _Call, mesh: AbstractMesh, q, k, v, sinks, visible: Visible) -> Array:
    """By each device on its rows and heads: the compiler cannot cut a Pallas kernel, and blocks are skipped by what a
    device has. All heads are on every device where the key heads do not divide. A device that has a part of each row's
    queries gathers all of its keys."""
    heads = partition_spec(("batch", "heads", "sequence", "hidden"), k.shape, mesh)
    parts = mesh.shape[CONTEXT]
    head_count = q.shape[1] // (1 if heads[1] is None else mesh.shape[RULES["heads"][0]])
    kernels = _splash_kernels(call, head_count, q.shape[2], parts)
    shares = NamedSharding(mesh, PartitionSpec(None, CONTEXT if parts > 1 else None))
    kernel_specs = tuple(kernel.manual_sharding_spec(shares) for kernel in kernels)
    whole, rows = PartitionSpec(), PartitionSpec(heads[0], heads[2])
    specs = Visible(None if visible.begins is None else rows, whole, whole)  # type: ignore[arg-type]
    visible = visible._replace(kind=jnp.asarray(visible.kind), index=jnp.asarray(visible.index))

    def part(kernels, q, k, v, sinks, visible):
        if parts > 1:
            visible = visible._replace(index=visible.index + jax.lax.axis_index(CONTEXT) * q.shape[2])
            k, v = (_gathered(each, call.dtype) for each in (k, v))
        return _part(call, kernels, q, k, v, sinks, visible)

    in_specs = (kernel_specs, heads, heads, heads, PartitionSpec(*heads[:2]), specs)
    cut = jax.shard_map(part, in_specs=in_specs, out_specs=heads, check_vma=False)
    return cut(kernels, q, k, v, sinks, visible)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: Float[Array, "B G S h"], dtype: jnp.dtype) -> Float[Array, "B G K h"]:
    """The whole row's, of which each device along the context has a part: exchanged in `dtype`, and its gradient's parts
    in the type of sums."""
    return jax.lax.all_gather(x.astype(dtype), CONTEXT, axis=2, tiled=True).astype(sum_type(dtype))


_gathered.defvjp(
    lambda x, dtype: (_gathered(x, dtype), None),
    lambda dtype, _, cotangent: (jax.lax.psum_scatter(cotangent, CONTEXT, scatter_dimension=2, tiled=True),),
)


def _splash_kernels(call: _Call, heads: int, length: int, context: int = 1) -> tuple[Any, ...]:
    """One for each window; none for the other kernels. Imported where it is used: Pallas's kernels take half a second."""
    if call.kernel != "splash":
        return ()
    from cpt_jax.models.kernels.tpu import splash_kernel_of

    return tuple(
        splash_kernel_of(heads, length, window, call.softcap, context) for window in dict.fromkeys(call.windows)
    )


def _part(call: _Call, kernels: tuple[Any, ...], q, k, v, sinks, visible: Visible) -> Array:
    """One device's part."""
    if call.kernel == "blocks":
        return blocks(q, k, v, visible, call.windows, call.softcap, call.dtype, sinks)
    if call.kernel == "splash":
        from cpt_jax.models.kernels.tpu import splash

        documents = None
        if visible.begins is not None:
            keys = visible.begins
            if k.shape[2] > q.shape[2]:
                keys = jax.lax.all_gather(keys, CONTEXT, axis=1, tiled=True)
            documents = visible.begins, keys
        runs = [
            functools.partial(splash, kernel, documents=documents, dtype=call.dtype, sinks=sinks) for kernel in kernels
        ]
        return _of_window(runs, call.windows, visible, q, k, v)
    from cpt_jax.models.kernels import gpu

    if call.kernel == "tokamax":
        return checkpoint_name(gpu.tokamax(q, k, v, visible, call.windows, call.softcap, call.dtype), SAVED)
    runs = [
        functools.partial(gpu.cudnn, visible=visible, window=window, documents=call.documents, dtype=call.dtype)
        for window in dict.fromkeys(call.windows)
    ]
    return checkpoint_name(_of_window(runs, call.windows, visible, q, k, v), SAVED)


def _of_window(runs: list[Callable[..., Array]], windows: Windows, visible: Visible, *arrays: Array) -> Any:
    """Of kernels that have to know their window when they are compiled, that of the layer's kind."""
    different = list(dict.fromkeys(windows))
    if len(different) == 1:
        return runs[0](*arrays)
    number = jnp.asarray([different.index(window) for window in windows])[visible.kind]
    return jax.lax.switch(number, runs, *arrays)
