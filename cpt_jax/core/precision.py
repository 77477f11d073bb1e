"""Which numbers are computed in which type."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

# Weights that are no matrices, by the last part of their paths.
VECTORS = ("scale", "bias", "magnitude", "kernel_norm", "layer_scalar", "a_log", "step_bias", "skip", "sinks")
VECTORS += ("router_scale", "router_bias", "expert_scale", "correction_bias", "alpha_p", "alpha_n", "beta", "eps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """Matrix products take inputs of type `compute` and sum in float32; what trains is kept in float32 all the same.
    "float32" is float32 on every device, not TF32 or bfloat16, unless `jax_default_matmul_precision` is set.

    "float16", which is for GPUs without bfloat16 (T4, V100), needs no loss scaling: what is differentiated is the sum over the
    tokens, not their mean, and what a layer adds to is float32 (`benchmarks/half_precision.py`).

    "float64" (with jax.enable_x64) is for checks alone. Frozen matrices are held in `compute`; vectors (norms,
    biases) stay float32: they cost nothing. `frozen_kernels` "int8" or "nf4" keeps the layers' frozen kernels in 8 or 4
    bits while a stage trains.
    """

    compute: Literal["float32", "bfloat16", "float16", "float64"] = "bfloat16"
    frozen_kernels: Literal["as computed", "int8", "nf4"] = "as computed"

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.compute)

    def dtype_of(self, path: str) -> Any:
        """The type of a frozen leaf, by its path."""
        return jnp.dtype(jnp.float32) if path.rpartition("/")[2] in VECTORS else self.dtype


FLOAT32 = Precision(compute="float32")
# For checks, with jax.enable_x64.
FLOAT64 = Precision(compute="float64")
