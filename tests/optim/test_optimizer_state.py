"""An optimizer's state: its bytes, none of frozen weights, and where it lies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inputs import random_weights, tiny_config
from optimizer_inputs import DECAYED, OPTIMIZERS, SHAPES, SIZE, stepping

from cpt_jax.adapt import LoRA
from cpt_jax.checkpoint.train_state import Checkpoints
from cpt_jax.core.tree import flatten, partition, unflatten
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.optim.optimizer import Optimizer
from cpt_jax.sharding.mesh import MeshShape, make_mesh
from cpt_jax.sharding.rules import shardings
from cpt_jax.training.program import _state_shardings
from cpt_jax.training.state import initial_state


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of what belongs to weights: counters and optax's placeholders of one element a layer are left out."""
    tree = unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()})
    state = jax.eval_shape(optimizer.build(tree).init, tree)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.shape[-1] > 1)


def test_the_state_takes_the_memory_computed_on_paper():
    total, matrices, rows = sum(SIZE.values()), sum(SIZE[path] for path in DECAYED), SIZE["embed/new"]
    # Matrices of at least 4 x 4: a number a row and a column instead of one an element.
    factored = {
        "embed/base": 12 + 6,
        "layers/attention/q/kernel": 3 * (6 + 8),
        "layers/experts/gate/kernel": 3 * 9 * (6 + 10),
        "layers/experts/router": 3 * (6 + 4),
    }
    kept = sum(factored.values()) + total - rows - sum(SIZE[path] for path in factored)
    coefficients = 3 * 4  # of Newton and Schulz's polynomial
    expected = {
        "adamw": (8 * total, 6 * total),
        "adafactor": (4 * kept + 8 * rows, 4 * kept + 6 * rows),
        "lion": (4 * total + 4 * rows, 2 * total + 4 * rows),
        # Muon's momentum is one moment, the others' are two; its two depths each keep the coefficients.
        "muon": (8 * total - 4 * matrices + 2 * coefficients, 6 * total - 4 * matrices + 2 * coefficients),
    }
    for name, optimizer in OPTIMIZERS.items():
        coarse = dataclasses.replace(optimizer, moments="bfloat16")
        assert (state_bytes(optimizer), state_bytes(coarse)) == expected[name], name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_leaves_have_no_state(name):
    config, method = tiny_config(new_rows=10), LoRA(rank=4, alpha=8)
    trainable, frozen = partition(random_weights(config, lora=method.lora_config()), method.trains)
    state = jax.eval_shape(OPTIMIZERS[name].build(trainable).init, trainable)
    paths = set()
    for keys, _ in jax.tree_util.tree_leaves_with_path(state):
        paths.add("/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey)))
    assert not [path for path in paths for leaf in flatten(frozen) if path.endswith(leaf)]
    assert all(any(path.endswith(leaf) for path in paths) for leaf in flatten(trainable))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_lies_as_its_weights_and_a_step_on_eight_devices_is_that_of_one(name, tmp_path):
    config = tiny_config(new_rows=10)
    network, mesh = abstract_decoder(config), make_mesh(shape=MeshShape(fsdp=4, tensor=2))
    weights = random_weights(config)
    gradients = jax.tree.map(lambda leaf: leaf[::-1] * 0.01, weights)
    where = flatten(shardings(network.logical_axes, network.shapes, mesh))
    optimizer = (
        dataclasses.replace(OPTIMIZERS[name], min_dim_size_to_factor=16) if name == "adafactor" else OPTIMIZERS[name]
    )
    transform = stepping(optimizer, weights)

    def begin(tree):
        return initial_state(tree, transform, with_average=True)

    placement = _state_shardings(jax.eval_shape(begin, weights), where, mesh, None)
    placed = {path: jax.device_put(leaf, where[path]) for path, leaf in flatten(weights).items()}
    state = jax.jit(begin, out_shardings=placement)(unflatten(placed))
    seen = 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer_state):
        path = "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
        of = next((each for each in where if path.endswith(each)), None)
        if of is not None and leaf.shape == placed[of].shape:
            seen += 1
            assert leaf.sharding == where[of], path
        else:
            assert leaf.sharding.is_fully_replicated, path
    # Of the others, each weight's one moment; factored ones have none of its shape.
    assert seen >= {"adamw": 2, "lion": 1, "muon": 1}.get(name, 0) * len(where)
    if name == "adamw":
        assert (
            not state.optimizer_state[0]
            .inner_state[1]
            .inner_states["matrices"]
            .inner_state[0]
            .mu["layers"]["mlp"]["up"]["kernel"]
            .sharding.is_fully_replicated
        )

    def step(state, gradients):
        updates, optimizer_state = transform.update(gradients, state.optimizer_state, state.trainable)
        return state._replace(trainable=optax.apply_updates(state.trainable, updates), optimizer_state=optimizer_state)

    one = jax.jit(step)(begin(jax.tree.map(jnp.asarray, weights)), gradients)
    eight = jax.jit(step, donate_argnums=0, out_shardings=placement)(state, gradients)
    for path, leaf in flatten(one.trainable).items():
        np.testing.assert_allclose(flatten(eight.trainable)[path], leaf, atol=1e-5, err_msg=path)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(eight, {}, 1.0)
    checkpoints.wait()
    found = checkpoints.restore(eight)
    checkpoints.close()
    assert found is not None
    jax.tree.map(np.testing.assert_array_equal, found[0], eight)
