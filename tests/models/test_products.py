"""float32 is multiplied as float32 wherever a model multiplies, also where JAX by itself would take TF32 or bfloat16."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from inputs import tiny_config
from jax.extend import core as jaxprs

from cpt_jax.adapt import Full, LoRA, Method
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.products import precision_of
from cpt_jax.training.loss import make_loss

EXPERTS = ExpertsConfig(count=4, per_token=2, renormalise=True, balance_coefficient=0.1, shared_intermediate_size=24)
PRODUCTS = ("dot_general", "ragged_dot_general")
MODELS: dict[str, tuple[Method, dict]] = {
    "full": (Full(), {}),
    "DoRA and rows": (LoRA(rank=4, alpha=8, dora=True), {"new_rows": 10}),
    "experts": (LoRA(rank=4, alpha=8, new_rows=False), {"experts": EXPERTS}),
    "attention in blocks": (Full(), {"attention": "blocks", "attention_softcap": 20.0}),
}


def precisions(jaxpr) -> Iterator[object]:
    """Of all matrix products of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            yield equation.params["precision"]
        for part in jaxprs.jaxprs_in_params(equation.params):
            yield from precisions(part)


def of_a_step(name: str, compute: str) -> list[object]:
    method, sizes = MODELS[name]
    config = method.layout(dataclasses.replace(tiny_config(), **sizes))
    network = abstract_decoder(config, method.lora_config())
    loss = make_loss(network, compute, method.trains, ("text",))
    rows = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    names = ("inputs", "targets", "positions", "segment_ids", "domains")
    batch = dict.fromkeys(names, rows) | {"weights": jax.ShapeDtypeStruct((2, 64), jnp.float32)}
    traced = jax.make_jaxpr(jax.grad(lambda weights, batch: loss(weights, batch)[0], allow_int=True))
    return list(precisions(traced(network.shapes, batch).jaxpr))


@pytest.mark.parametrize("name", MODELS)
def test_every_product_of_a_step_in_float32_is_one_of_float32(name):
    found = of_a_step(name, "float32")
    assert len(found) > 20
    assert set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


def test_bfloat16_is_left_as_it_is():
    # Sums over domains are of float32.
    found = of_a_step("full", "bfloat16")
    assert [each for each in found if each is not None] == [(jax.lax.Precision.HIGHEST,) * 2]


def test_what_jax_is_told_goes_first():
    float32 = jnp.dtype("float32")
    assert precision_of(float32) == "highest"
    with jax.default_matmul_precision("tensorfloat32"):
        assert precision_of(float32) is None
