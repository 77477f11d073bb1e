"""Each optimizer against a float64 computation or optax on plain leaves; groups, state, configuration."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inputs import random_weights, tiny_config
from optimizer_inputs import DECAYED, GRADIENTS, MULTIPLIERS, OPTIMIZERS, SHAPES, SIZE, WEIGHTS, schedule, stepping

from cpt_jax.adapt import Full, LoRA
from cpt_jax.checkpoint.train_state import Checkpoints
from cpt_jax.core.config import from_json, to_json
from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import flatten, partition, unflatten
from cpt_jax.data.sources import Corpus
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.optim.groups import group_of
from cpt_jax.optim.optimizer import Adafactor, AdamW, Lion, Muon, Optimizer
from cpt_jax.optim.schedules import Cosine
from cpt_jax.recipe.find import apply_overrides
from cpt_jax.recipe.recipe import Domain, Recipe, Stage
from cpt_jax.sharding.mesh import MeshShape, make_mesh
from cpt_jax.sharding.rules import shardings
from cpt_jax.training.program import _state_shardings
from cpt_jax.training.state import initial_state


def run(optimizer: Optimizer, gradients=GRADIENTS, weights=WEIGHTS) -> dict[str, np.ndarray]:
    tree = unflatten({path: jnp.asarray(leaf) for path, leaf in weights.items()})
    transform = stepping(optimizer, tree)
    state, update = transform.init(tree), jax.jit(transform.update)
    for each in gradients:
        updates, state = update(unflatten({path: each[path] for path in weights}), state, tree)
        tree = optax.apply_updates(tree, updates)
    return {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}


def clipped() -> list[dict[str, np.ndarray]]:
    """The gradients in float64, clipped to a norm of 1."""
    result = []
    for each in GRADIENTS:
        norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in each.values()))
        result.append({path: leaf / max(1.0, norm) for path, leaf in each.items()})
    return result


def reference(direction, path: str, multiplier=None, decay=None) -> np.ndarray:
    """Ten steps of a weight in float64; `direction(step, gradient, weight)` is the optimizer's, before decay."""
    weight = WEIGHTS[path].astype(np.float64)
    multiplier = MULTIPLIERS.get(path, 1.0) if multiplier is None else multiplier
    decay = (0.3 if path in DECAYED else 0.0) if decay is None else decay
    for step, each in enumerate(clipped()):
        weight = weight - schedule(step) * multiplier * (direction(step, each[path], weight) + decay * weight)
    return weight


def adam(epsilon: float, b1: float = 0.9, b2: float = 0.99):
    mean, square = 0.0, 0.0

    def direction(step, gradient, _weight):
        nonlocal mean, square
        mean, square = b1 * mean + (1 - b1) * gradient, b2 * square + (1 - b2) * gradient**2
        return mean / (1 - b1 ** (step + 1)) / (np.sqrt(square / (1 - b2 ** (step + 1))) + epsilon)

    return direction


def epsilon_of(path: str) -> float:
    return 5e-5 if path == "embed/new" else 1e-8


def close(found: np.ndarray, expected: np.ndarray, path: str, atol: float = 2e-6) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=atol, err_msg=path)


def test_adamw_is_that_of_float64():
    found = run(OPTIMIZERS["adamw"])
    for path in SHAPES:
        close(found[path], reference(adam(epsilon_of(path)), path), path)


def test_lion_is_that_of_float64_and_new_rows_get_adamw():
    def lion():
        mean = 0.0

        def direction(_step, gradient, _weight):
            nonlocal mean
            sign = np.sign(0.9 * mean + 0.1 * gradient)
            mean = 0.99 * mean + 0.01 * gradient
            return sign

        return direction

    found = run(OPTIMIZERS["lion"])
    for path in SHAPES:
        close(found[path], reference(adam(5e-5) if path == "embed/new" else lion(), path), path)


def slices(path: str) -> list[tuple[int, ...]]:
    """Where the layers' (and experts') own matrices and vectors lie in a leaf."""
    axes = 0
    if path.startswith("layers/"):
        axes = len(SHAPES[path]) - (1 if path.endswith(("/scale", "/bias", "/magnitude")) else 2)
    return list(np.ndindex(SHAPES[path][:axes]))


@pytest.mark.parametrize(("momentum", "relative"), [(None, True), (0.9, False)])
def test_adafactor_is_optax_on_every_layer_by_itself(momentum, relative):
    # The two longest axes of the experts' leaf, which optax would factor, are the experts and one of their matrices'.
    found = run(dataclasses.replace(OPTIMIZERS["adafactor"], momentum=momentum, multiply_by_parameter_scale=relative))
    gradients = clipped()
    alone = optax.adafactor(1.0, min_dim_size_to_factor=4, multiply_by_parameter_scale=relative, momentum=momentum)

    @functools.partial(jax.jit, static_argnums=2)
    def plain(weight, gradients, path):
        decay, multiplier = 0.3 if path in DECAYED else 0.0, MULTIPLIERS.get(path, 1.0)

        def step(carry, gradient):
            weight, state, count = carry
            updates, state = alone.update(gradient, state, weight)
            weight += schedule(count) * multiplier * (updates - decay * weight)
            return (weight, state, count + 1), None

        return jax.lax.scan(step, (weight, alone.init(weight), 0), gradients)[0][0]

    for path in SHAPES:
        if path == "embed/new":
            close(found[path], reference(adam(5e-5), path), path)
            continue
        for at in slices(path):
            weight = plain(WEIGHTS[path][at], np.stack([each[path][at] for each in gradients], dtype=np.float32), path)
            close(found[path][at], weight, path, atol=2e-5)


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def test_muon_is_that_of_float64_on_every_matrix_by_itself_and_the_rest_get_adamw():
    def muon():
        mean = 0.0

        def direction(step, gradient, _weight):
            nonlocal mean
            mean = 0.95 * mean + 0.05 * gradient
            ahead = 0.95 * mean / (1 - 0.95 ** (step + 2)) + 0.05 * gradient / (1 - 0.95 ** (step + 1))
            flat = ahead.reshape(-1, *ahead.shape[-2:])
            update = np.stack([newton_schulz(matrix) for matrix in flat]).reshape(ahead.shape)
            return 0.2 * np.sqrt(max(ahead.shape[-2:])) * update

        return direction

    found = run(OPTIMIZERS["muon"])
    first = run(dataclasses.replace(OPTIMIZERS["muon"], weight_decay=0.0), GRADIENTS[:1])
    for path in SHAPES:
        close(found[path], reference(muon() if path in DECAYED else adam(epsilon_of(path)), path), path, atol=1e-4)
        if path in DECAYED:
            # The update is orthogonal, nearly: singular values between 0.5 and 1.5 (times its scale).
            moved = (WEIGHTS[path] - first[path]) / schedule(0)
            values = np.linalg.svd(moved, compute_uv=False) / (0.2 * np.sqrt(max(SHAPES[path][-2:])))
            assert values.min() > 0.4
            assert values.max() < 1.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_layer_takes_no_notice_of_another(name):
    changed = [{path: leaf.copy() for path, leaf in each.items()} for each in GRADIENTS[:3]]
    for each in changed:
        for path in DECAYED:
            each[path][1] *= 1.5
    optimizer = dataclasses.replace(OPTIMIZERS[name], clip_norm=1e9)
    before, after = run(optimizer, GRADIENTS[:3]), run(optimizer, changed)
    for path in DECAYED:
        np.testing.assert_array_equal(before[path][[0, 2]], after[path][[0, 2]])


def test_adapters_decay_only_if_asked():
    path = "layers/attention/q/lora_b"
    found = run(dataclasses.replace(OPTIMIZERS["adamw"], decay_adapters=True))
    close(found[path], reference(adam(1e-8), path, decay=0.3), path)
    close(found["layers/attention/q/magnitude"], reference(adam(1e-8), "layers/attention/q/magnitude"), path)


def test_bfloat16_moments_follow_float32():
    for name, optimizer in OPTIMIZERS.items():
        if name == "lion":
            continue  # A sign is the one or the other.
        exact, coarse = run(optimizer), run(dataclasses.replace(optimizer, moments="bfloat16"))
        for path in SHAPES:
            moved = np.abs(exact[path] - WEIGHTS[path]).max()
            assert np.abs(coarse[path] - exact[path]).max() < 0.05 * moved, (name, path)


def test_every_weight_is_in_one_group():
    groups = {path: group_of(path) for path in SHAPES}
    assert groups == {
        "embed/base": "old_rows",
        "embed/new": "new_rows",
        "final_norm/scale": "others",
        "layers/attention/q/bias": "others",
        "layers/attention/q/kernel": "matrices",
        "layers/attention/q/lora_a": "lora_a",
        "layers/attention/q/lora_b": "lora_b",
        "layers/attention/q/magnitude": "others",
        "layers/attention_norm/scale": "others",
        "layers/experts/gate/kernel": "matrices",
        "layers/experts/router": "others",
    }
    assert group_of("head/base") == "old_rows"
    assert group_of("head/new") == "new_rows"


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


def recipe(optimizer: Optimizer) -> Recipe:
    stage = Stage(
        name="all", method=Full(), mixture={"zh": 1.0}, tokens=1024, batch_size=2, sequence_length=64,
        optimizer=optimizer, schedule=Cosine(),
    )  # fmt: skip
    return Recipe(
        name="r", base="base", domains=(Domain(corpus=Corpus(name="zh", spec="zh.jsonl"), role="new"),), stages=(stage,)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_configuration_is_json_and_overrides_name_the_fields_of_the_optimizer_at_hand(name):
    changed = dataclasses.replace(OPTIMIZERS[name], skip_above=10.0, moments="bfloat16")
    assert from_json(Optimizer, json.loads(json.dumps(to_json(changed)))) == changed
    given = recipe(changed)
    assert from_json(Recipe, json.loads(json.dumps(to_json(given)))) == given
    own = {"adamw": "b1", "adafactor": "decay_rate", "lion": "b2", "muon": "beta"}[name]
    for field, text, value in ((own, "0.5", 0.5), ("skip_above", "None", None), ("lora_b_multiplier", "4", 4.0)):
        overridden = apply_overrides(given, [f"--stages.0.optimizer.{field}", text])
        assert overridden.stages[0].optimizer == dataclasses.replace(changed, **{field: value})
    other = "beta" if name != "muon" else "b1"
    with pytest.raises(UserError, match=other):
        apply_overrides(given, [f"--stages.0.optimizer.{other}", "0.5"])


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (AdamW, dict(learning_rate=0.0)),
        (AdamW, dict(b1=1.0)),
        (AdamW, dict(lora_b_multiplier=-1.0)),
        (AdamW, dict(moments="int8")),
        (AdamW, dict(skip_above=1.0)),
        (AdamW, dict(max_skipped=0)),
        (Adafactor, dict(decay_rate=0.0)),
        (Adafactor, dict(momentum=1.0)),
        (Adafactor, dict(min_dim_size_to_factor=0)),
        (Lion, dict(b2=-0.1)),
        (Muon, dict(newton_schulz_steps=0)),
        (Muon, dict(adam_epsilon=0.0)),
        (Muon, dict(weight_decay=-0.1)),
    ],
)
def test_a_setting_that_cannot_be_is_refused_where_it_is_made(make, changes):
    ((field, value),) = changes.items()
    with pytest.raises(UserError, match=f"{field} is {value}: give"):
        make(**(dict(learning_rate=1e-3) | changes))
