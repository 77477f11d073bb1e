"""Which kernels can do a piece of attention, and which one is taken when none is named."""

import dataclasses
import importlib.util
import math
from collections.abc import Iterator
from typing import Literal

import jax.numpy as jnp

from cpt_jax.core.errors import UserError
from cpt_jax.models.kernels.blocks import block_size

Kernel = Literal["xla", "blocks", "cudnn", "tokamax", "splash"]
AttentionChoice = Literal["auto", "xla", "blocks", "cudnn", "tokamax", "splash"]

# In this order; where none of them can, the reference.
PREFERRED: dict[str, tuple[Kernel, ...]] = {
    "cpu": ("blocks",),
    "gpu": ("cudnn", "tokamax", "blocks"),
    "tpu": ("splash", "blocks"),
}
# From so many tokens a row on, blocks are taken unasked. On two CPU cores, SmolLM2 with LoRA makes 310 tokens a second
# with them and 333 without in rows of 256, 307 and 324 in rows of 512; in rows of 1,024 they took half the time, measured
# when the reference kept three times as much of its softmax (LOG.md). On accelerators memory decides: at 2,048 tokens, where
# an H200 takes 2.2 ms with the reference and 2.9 with blocks, the softmax that SmolLM2 keeps is 2 GB a row.
BLOCKS_FROM = {"cpu": 1024, "gpu": 2048, "tpu": 2048}
# Compute capabilities of NVIDIA GPUs, from and below: those that cuDNN has attention for (its frontend's support matrix),
# and those that tokamax 0.0.17 has a gradient for.
GENERATIONS = {
    "cudnn": (8.0, math.inf, "Ampere or a later"),
    "tokamax": (9.0, 11.0, "Hopper or (data centres) Blackwell"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a kernel is asked to do: rows of `length` tokens on a backend, cut into `context` parts, layers with these
    windows. `capability` is an NVIDIA GPU's (`hardware.compute_capability`); `head_dim` the wider of keys' and values'."""

    backend: str
    capability: float | None
    length: int
    head_dim: int
    windows: tuple[int | None, ...]
    softcap: float | None
    dtype: jnp.dtype
    context: int = 1
    sinks: bool = False


def within_rows(windows: tuple[int | None, ...], length: int) -> tuple[int | None, ...]:
    """The windows without those that no row is longer than."""
    return tuple(None if window is None or window >= length else window for window in windows)


def _needs(kernel: Kernel, work: Work) -> Iterator[tuple[bool, str]]:
    """(whether it holds, what the kernel needs)."""
    if kernel in ("cudnn", "tokamax"):
        oldest, beyond, generation = GENERATIONS[kernel]
        fits = work.capability is not None and oldest <= work.capability < beyond
        here = work.backend if work.capability is None else f"GPU of compute capability {work.capability:g}"
        yield fits, f"needs an NVIDIA GPU of the {generation} generation, this is a {here}"
        yield work.context == 1, f"wants whole rows, not {work.context} parts (the mesh's axis context)"
    if kernel == "splash":
        yield work.backend == "tpu", f"needs a TPU, this is a {work.backend}"
        parts = "rows" if work.context == 1 else f"rows in {work.context} parts, each"
        yield work.length % (128 * work.context) == 0, f"wants {parts} of a multiple of 128 tokens, not {work.length}"
    if kernel == "blocks" and work.context > 1:
        fits = work.length % (block_size() * work.context) == 0
        yield (
            fits,
            f"wants rows in {work.context} parts, each of a multiple of {block_size()} tokens, not {work.length}",
        )
    if kernel in ("cudnn", "tokamax"):
        yield not work.sinks, "has no attention sinks, the model does"
    if kernel in ("cudnn", "tokamax", "splash"):
        yield work.dtype == jnp.bfloat16, f"computes in bfloat16, not in {work.dtype.name}"
    if kernel == "cudnn":
        yield work.softcap is None, f"has no soft cap, the model's is {work.softcap}"
        fits = work.head_dim % 8 == 0 and work.head_dim <= 128
        yield fits, f"wants heads of a multiple of 8, up to 128, not {work.head_dim}"
        yield work.length % 2 == 0, f"wants rows of an even number of tokens, not {work.length}"
    if kernel == "tokamax":
        installed = importlib.util.find_spec("tokamax") is not None
        yield installed, 'needs tokamax: pip install "tokamax>=0.0.17"'


def refusal(kernel: Kernel, work: Work) -> str | None:
    """What the kernel needs and does not have here; None if it can do the work."""
    return next((text for holds, text in _needs(kernel, work) if not holds), None)


def kernel_for(asked: AttentionChoice, work: Work) -> Kernel:
    """The kernel that is asked for, or with "auto" the one that `choose` names.

    Raises:
      UserError: the kernel that is asked for cannot do this.
    """
    if asked == "auto":
        return choose(work)
    if (why := refusal(asked, work)) is not None:
        raise UserError(f"attention {asked!r} {why}: give 'auto', which takes {choose(work)!r} here")
    return asked


def choose(work: Work) -> Kernel:
    """The kernel for this work. float64 is for checks, which go by the reference."""
    if work.dtype == jnp.float64:
        return "xla"
    for kernel in PREFERRED.get(work.backend, ()):
        unasked = kernel != "blocks" or work.length >= BLOCKS_FROM[work.backend]
        if unasked and refusal(kernel, work) is None:
            return kernel
    return "xla"
