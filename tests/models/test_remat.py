"""What is recomputed changes neither loss nor gradients, and less is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import random_weights, tiny_config

from cpt_jax.core.config import from_json, to_json
from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import flatten
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.models.linear import LoRAConfig
from cpt_jax.models.remat import Remat
from cpt_jax.training.loss import make_loss

LORA = LoRAConfig(rank=4, alpha=8)
POLICIES = {
    "all": Remat(),
    "products": Remat(products=True),
    "named": Remat(keep=("attention_out", "mlp_gate")),
    "offloaded": Remat(keep=("mlp_up",), offload=("mlp_gate",)),
    "products and offloaded": Remat(products=True, offload=("attention_out",)),
}


def gradients(loop: str, remat: Remat | None):
    """(loss, gradients, bytes of temporaries) of a step on a packed batch."""
    config = tiny_config(num_layers=4, layer_loop=loop, remat=remat)
    tokens = np.random.default_rng(0).integers(0, 320, (4, 65)).astype(np.int32)
    rows = np.ones((4, 64), np.int32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(64, dtype=np.int32), (4, 1)),
        "segment_ids": rows + (np.arange(64) >= 40),
        "domains": 0 * rows,
        "weights": rows.astype(np.float32),
    }
    loss = make_loss(abstract_decoder(config), "float32", lambda path: True, ("text",))
    weights = jax.tree.map(jnp.asarray, random_weights(tiny_config(num_layers=4)))
    compiled = jax.jit(jax.value_and_grad(lambda weights: loss(weights, batch)[0])).lower(weights).compile()
    value, found = compiled(weights)
    return value, flatten(found), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_loss_and_gradients_are_the_same_and_less_is_kept(loop):
    value, expected, memory = gradients(loop, None)
    needed = {}
    for name, remat in POLICIES.items():
        found_value, found, needed[name] = gradients(loop, remat)
        np.testing.assert_allclose(found_value, value, rtol=1e-6, err_msg=name)
        for path, leaf in expected.items():
            np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=1e-4, err_msg=f"{name}: {path}")
    if loop == "scan":
        assert needed["all"] < needed["named"] < needed["products"] < memory


def test_layers_one_by_one_are_recomputed_all_the_same():
    """Nothing but a barrier keeps a compiler from taking what the forward pass computed; weights need none."""
    barriers = {}
    for loop in ("scan", "unroll"):
        network = abstract_decoder(tiny_config(num_layers=3, layer_loop=loop, intermediate_size=88), LORA)
        loss = make_loss(network, "float32", lambda path: True, ("text",))
        rows = jax.ShapeDtypeStruct((2, 16), jnp.int32)
        names = ("inputs", "targets", "positions", "segment_ids", "domains")
        batch = dict.fromkeys(names, rows) | {"weights": jax.ShapeDtypeStruct((2, 16), jnp.float32)}
        step = jax.jit(jax.grad(lambda weights, batch, loss=loss: loss(weights, batch)[0]))
        text = step.lower(network.shapes, batch).as_text()
        barriers[loop] = [line for line in text.splitlines() if "optimization_barrier" in line]
    assert barriers["scan"] == []
    # mlp_up and mlp_gate; all layers call one function.
    assert any(line.count("tensor<2x16x88xf32>") >= 2 for line in barriers["unroll"])
    assert not any("tensor<88x32xf32>" in line for line in barriers["unroll"])


def test_what_is_offloaded_goes_to_the_host():
    rows = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    names = ("inputs", "targets", "positions", "segment_ids", "domains")
    batch = dict.fromkeys(names, rows) | {"weights": jax.ShapeDtypeStruct((2, 16), jnp.float32)}
    on_host = []
    for remat in (Remat(keep=("mlp_up",)), Remat(offload=("mlp_up",))):
        network = abstract_decoder(tiny_config(num_layers=2, remat=remat))
        loss = make_loss(network, "float32", lambda path: True, ("text",))
        program = jax.make_jaxpr(jax.grad(lambda weights, batch, loss=loss: loss(weights, batch)[0]))
        on_host.append(str(program(network.shapes, batch)).count("<host>"))
    kept, offloaded = on_host
    assert kept == 0 < offloaded


def test_settings_are_checked_and_saved():
    with pytest.raises(UserError, match="'mlp'; there are: queries"):
        Remat(keep=("mlp",))
    with pytest.raises(UserError, match="both keeps and offloads mlp_up"):
        Remat(keep=("mlp_up",), offload=("mlp_up",))
    for remat in POLICIES.values():
        assert from_json(Remat | None, to_json(remat)) == remat


def test_a_policy_is_a_word():
    assert str(Remat()) == "all"
    assert str(POLICIES["products"]) == "products"
    assert str(POLICIES["offloaded"]) == "mlp_up,offload:mlp_gate"
    for policy in POLICIES.values():
        assert Remat.parse(str(policy)) == policy
