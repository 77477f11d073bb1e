"""The linear layer, with its optional low-rank adapter (LoRA: Hu et al. 2021, arXiv 2106.09685)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import Tree, flatten, unflatten
from cpt_jax.models.products import matmul

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Adapters of rank `rank` on the linears named in `targets`, scaled by alpha / rank."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = LINEARS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"LoRA rank is {self.rank}: give at least 1")
        for target in self.targets:
            if target not in LINEARS:
                raise UserError(f"LoRA target {target!r} is no linear layer; there are: {', '.join(LINEARS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Weight(nnx.Variable):
    """A weight; its metadata `logical_axes` names each axis (NNX's own `sharding_names` would shard eagerly)."""


class Linear(nnx.Module):
    """y = x W + scale (x A) B, the adapter only where it is asked for; never the merged W + scale A B, which costs a
    full product."""

    def __init__(
        self, name: str, axes: tuple[str, str], shape: tuple[int, int], lora: LoRAConfig | None, rngs: nnx.Rngs
    ) -> None:
        inputs, outputs = shape
        normal = jax.random.normal(rngs.params(), shape) * inputs**-0.5
        self.kernel = Weight(normal, logical_axes=axes)
        self.scale = lora.scale if lora is not None else 0.0
        self.has_adapter = lora is not None and name in lora.targets
        if lora is not None and self.has_adapter:
            # A as PEFT draws it (Kaiming uniform with a = sqrt 5); B zero, so that attaching changes nothing.
            bound = inputs**-0.5
            a = jax.random.uniform(rngs.params(), (inputs, lora.rank), minval=-bound, maxval=bound)
            self.lora_a = Weight(a, logical_axes=(axes[0], "rank"))
            self.lora_b = Weight(jnp.zeros((lora.rank, outputs)), logical_axes=("rank", axes[1]))

    def __call__(self, x: Float[Array, "*rows i"], dtype: jnp.dtype) -> Float[Array, "*rows o"]:
        y = matmul(x, self.kernel[...], dtype)
        if self.has_adapter:
            y += matmul(matmul(x, self.lora_a[...], dtype) * self.scale, self.lora_b[...], dtype)
        return y


def merge_lora(weights: Tree, lora: LoRAConfig) -> Tree:
    """The weights without adapters: each added into its kernel, in float32, on the host."""
    flat = flatten(weights)
    merged = {}
    for path, leaf in flat.items():
        if path.endswith(("/lora_a", "/lora_b")):
            continue
        layer = path.removesuffix("/kernel")
        if f"{layer}/lora_a" in flat:
            a, b = (np.asarray(flat[f"{layer}/lora_{x}"], np.float32) for x in "ab")
            leaf = np.asarray(leaf, np.float32) + np.float32(lora.scale) * np.matmul(a, b)
        merged[path] = leaf
    return unflatten(merged)
