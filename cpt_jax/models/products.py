"""Matrix products with low-precision inputs and float32 sums, in both directions.

JAX's own gradient of such a product multiplies a float32 cotangent with a bfloat16 operand, a mixed product for
which XLA has no fast kernel. Here the cotangent is rounded too, as autocast does. On a CPU with AVX-512 BF16 that is
400 GFLOP/s instead of 200.

A weight may be quantised: it is kept so for the backward pass, made dense a second time there, and has no gradient.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cpt_jax.models.quantised import OfStack, dense, is_quantised
from cpt_jax.sharding.hardware import backend

# The name by which a policy of rematerialisation keeps products.
PRODUCT = "product"


def sum_type(dtype: jnp.dtype) -> jnp.dtype:
    """What products of inputs of `dtype` are summed in: float32, but float64 for the exact mode in which exports are
    checked."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def precision_of(dtype: jnp.dtype) -> Literal["highest"] | None:
    """The precision of a product of inputs of `dtype`. float32 is multiplied as float32, which JAX by itself does not do on
    GPUs (TF32, 11 bits) and TPUs (one product of bfloat16, 8 bits); where `jax_default_matmul_precision` is set, as that
    says.
    """
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return "highest" if dtype == jnp.float32 and asked is None else None


def _product(a: Array, b: Array, dtype: jnp.dtype, name: str | None = None) -> Array:
    """A product that other layers read: in the type of the sums; accelerators write and read back the half of it, in
    the inputs' type, as everybody does there. What is written has the `name`."""
    written = sum_type(dtype) if backend() == "cpu" else dtype
    y = jnp.matmul(a, b, precision=precision_of(dtype), preferred_element_type=written)
    return (y if name is None else checkpoint_name(y, name)).astype(sum_type(dtype))


def matmul(
    x: Float[Array, "*rows i"], weight: Any, dtype: jnp.dtype, *, name: str | None = PRODUCT
) -> Float[Array, "*rows o"]:
    """`x @ weight` (weight [i, o], or quantised), inputs rounded to `dtype`, result float32.

    `Remat(products=True)` keeps it, unless it has no `name`.
    """
    return cast(tuple[Array, ...], _matmuls(x, (weight,), dtype, name))[0]


def matmuls(x: Float[Array, "*rows i"], weights: Sequence[Any], dtype: jnp.dtype) -> tuple[Array, ...]:
    """`x @ weight` for each weight: of x one rounded copy is kept, and its gradient is summed in float32."""
    return cast(tuple[Array, ...], _matmuls(x, tuple(weights), dtype, PRODUCT))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmuls(x, weights, dtype, name):
    return _matmuls_forward(x, weights, dtype, name)[0]


def _matmuls_forward(x, weights, dtype, name):
    low = x.astype(dtype)
    return tuple(_product(low, dense(w, dtype), dtype, name) for w in weights), (low, weights)


def _matmuls_backward(dtype, name, residuals, cotangents):
    x, weights = residuals
    dx, dweights, rows = 0.0, [], tuple(range(x.ndim - 1))
    for weight, cotangent in zip(weights, cotangents, strict=True):
        low = cotangent.astype(dtype)
        dx += _product(low, dense(weight, dtype).T, dtype)
        if is_quantised(weight):
            dweights.append(None)
            continue
        contracted = ((rows, rows), ((), ()))
        dweight = jax.lax.dot_general(
            x, low, contracted, preferred_element_type=sum_type(dtype), precision=precision_of(dtype)
        )
        dweights.append(_as_stored(weight, dweight))
    # x reached the forward pass as float32: only its rounded copy was kept.
    return dx, tuple(dweights)


def _as_stored(weight: Any, gradient: Array) -> Any:
    """A gradient in the form of its weight."""
    rounded = gradient.astype(weight.dtype)
    return weight.gradient(rounded) if isinstance(weight, OfStack) else rounded


_matmuls.defvjp(_matmuls_forward, _matmuls_backward)


def contract(spec: str, a: Array, b: Array, dtype: jnp.dtype) -> Array:
    """`jnp.einsum(spec, a, b)` of two operands, inputs rounded to `dtype`, result float32."""
    return cast(Array, _contract(spec, a, b, dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _contract(spec, a, b, dtype):
    return _contract_forward(spec, a, b, dtype)[0]


def _contract_forward(spec, a, b, dtype):
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(spec, a, b, preferred_element_type=sum_type(dtype), precision=precision_of(dtype)), (a, b)


def _contract_backward(spec, dtype, residuals, cotangent):
    a, b = residuals
    inputs, out = spec.split("->")
    first, second = inputs.split(",")
    low = cotangent.astype(dtype)
    da = jnp.einsum(
        f"{out},{second}->{first}", low, b, preferred_element_type=sum_type(dtype), precision=precision_of(dtype)
    )
    db = jnp.einsum(
        f"{first},{out}->{second}", a, low, preferred_element_type=sum_type(dtype), precision=precision_of(dtype)
    )
    return da, db


_contract.defvjp(_contract_forward, _contract_backward)


def grouped_matmul(
    x: Float[Array, "N i"], weight: Any, sizes: Int[Array, "E"], dtype: jnp.dtype
) -> Float[Array, "N o"]:
    """Rows in groups, one behind the other, each group times its own matrix of `weight` [E, i, o] (or quantised); rows
    behind the last group give zero.

    Inputs rounded to `dtype`, result float32.
    """
    return cast(Array, _grouped(x, weight, sizes, dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(x, weight, sizes, dtype):
    return _grouped_forward(x, weight, sizes, dtype)[0]


def _of_groups(rows, sizes):
    """Rows that belong to no group as zeros: what a kernel leaves there is not specified."""
    return jnp.where((jnp.arange(rows.shape[0]) < sizes.sum())[:, None], rows, 0)


def _grouped_forward(x, weight, sizes, dtype):
    low = x.astype(dtype)
    y = jax.lax.ragged_dot(
        low, dense(weight, dtype), sizes, preferred_element_type=sum_type(dtype), precision=precision_of(dtype)
    )
    return _of_groups(y, sizes), (low, weight, sizes)


def _grouped_backward(dtype, residuals, cotangent):
    x, weight, sizes = residuals
    low = _of_groups(cotangent, sizes).astype(dtype)
    transposed = dense(weight, dtype).swapaxes(1, 2)
    dx = jax.lax.ragged_dot(
        low, transposed, sizes, preferred_element_type=sum_type(dtype), precision=precision_of(dtype)
    )
    if is_quantised(weight):
        return _of_groups(dx, sizes), None, None
    by_group = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    dweight = jax.lax.ragged_dot_general(
        x, low, sizes, by_group, preferred_element_type=sum_type(dtype), precision=precision_of(dtype)
    )
    return _of_groups(dx, sizes), _as_stored(weight, dweight), None


_grouped.defvjp(_grouped_forward, _grouped_backward)
