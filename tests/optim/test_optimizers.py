"""Each optimizer against a float64 computation or optax on plain leaves, and the groups of weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizer_inputs import DECAYED, GRADIENTS, MULTIPLIERS, OPTIMIZERS, SHAPES, WEIGHTS, schedule, stepping

from cpt_jax.core.tree import flatten, unflatten
from cpt_jax.optim.groups import group_of
from cpt_jax.optim.optimizer import Optimizer


def run(optimizer: Optimizer, gradients=GRADIENTS, weights=WEIGHTS) -> dict[str, np.ndarray]:
    tree = unflatten({path: jnp.asarray(leaf) for path, leaf in weights.items()})
    transform = stepping(optimizer, tree)
    state, update = transform.init(tree), jax.jit(transform.update)
    for each in gradients:
        updates, state = update(unflatten({path: each[path] for path in weights}), state, tree)
        tree = optax.apply_updates(tree, updates)
    return {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}


def clipped() -> list[dict[str, np.ndarray]]:
    """The gradients in float64, clipped to a norm of 2."""
    result = []
    for each in GRADIENTS:
        norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in each.values()))
        result.append({path: leaf / max(1.0, norm / 2) for path, leaf in each.items()})
    return result


def reference(direction, path: str, multiplier=None, decay=None) -> np.ndarray:
    """Ten steps of a weight in float64; `direction(step, gradient, weight)` is the optimizer's, before decay."""
    weight = WEIGHTS[path].astype(np.float64)
    multiplier = MULTIPLIERS.get(path, 1.0) if multiplier is None else multiplier
    decay = (0.3 if path in DECAYED else 0.0) if decay is None else decay
    for step, each in enumerate(clipped()):
        weight = weight - schedule(step) * multiplier * (direction(step, each[path], weight) + decay * weight)
    return weight


def adam(epsilon: float, b1: float, b2: float):
    mean, square = 0.0, 0.0

    def direction(step, gradient, _weight):
        nonlocal mean, square
        mean, square = b1 * mean + (1 - b1) * gradient, b2 * square + (1 - b2) * gradient**2
        return mean / (1 - b1 ** (step + 1)) / (np.sqrt(square / (1 - b2 ** (step + 1))) + epsilon)

    return direction


# What new rows get beside another optimizer than AdamW.
ROWS = dict(epsilon=2e-5, b1=0.9, b2=0.99)


def adam_of(path: str):
    return adam(epsilon=2e-5 if path == "embed/new" else 1e-4, b1=0.8, b2=0.95)


def close(found: np.ndarray, expected: np.ndarray, path: str, atol: float = 2e-6) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=atol, err_msg=path)


def test_adamw_is_that_of_float64():
    found = run(OPTIMIZERS["adamw"])
    for path in SHAPES:
        close(found[path], reference(adam_of(path), path), path)


def test_lion_is_that_of_float64_and_new_rows_get_adamw():
    def lion():
        mean = 0.0

        def direction(_step, gradient, _weight):
            nonlocal mean
            sign = np.sign(0.8 * mean + 0.2 * gradient)
            mean = 0.95 * mean + 0.05 * gradient
            return sign

        return direction

    found = run(OPTIMIZERS["lion"])
    for path in SHAPES:
        close(found[path], reference(adam(**ROWS) if path == "embed/new" else lion(), path), path)


def slices(path: str) -> list[tuple[int, ...]]:
    """Where the layers' (and experts') own matrices and vectors lie in a leaf."""
    axes = 0
    if path.startswith("layers/"):
        axes = len(SHAPES[path]) - (1 if path.endswith(("/scale", "/bias", "/magnitude")) else 2)
    return list(np.ndindex(SHAPES[path][:axes]))


@pytest.mark.parametrize(("momentum", "relative"), [(None, True), (0.8, False)])
def test_adafactor_is_optax_on_every_layer_by_itself(momentum, relative):
    # The two longest axes of the experts' leaf, which optax would factor, are the experts and one of their matrices'.
    found = run(dataclasses.replace(OPTIMIZERS["adafactor"], momentum=momentum, multiply_by_parameter_scale=relative))
    gradients = clipped()
    alone = optax.adafactor(
        1.0,
        decay_rate=0.7,
        clipping_threshold=0.8,
        min_dim_size_to_factor=4,
        multiply_by_parameter_scale=relative,
        momentum=momentum,
    )

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
            close(found[path], reference(adam(**ROWS), path), path)
            continue
        for at in slices(path):
            weight = plain(WEIGHTS[path][at], np.stack([each[path][at] for each in gradients], dtype=np.float32), path)
            close(found[path][at], weight, path, atol=2e-5)


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    x = matrix / np.linalg.norm(matrix)
    for _ in range(6):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def test_muon_is_that_of_float64_on_every_matrix_by_itself_and_the_rest_get_adamw():
    def muon():
        mean = 0.0

        def direction(step, gradient, _weight):
            nonlocal mean
            mean = 0.9 * mean + 0.1 * gradient
            ahead = 0.9 * mean / (1 - 0.9 ** (step + 2)) + 0.1 * gradient / (1 - 0.9 ** (step + 1))
            flat = ahead.reshape(-1, *ahead.shape[-2:])
            update = np.stack([newton_schulz(matrix) for matrix in flat]).reshape(ahead.shape)
            return 0.3 * np.sqrt(max(ahead.shape[-2:])) * update

        return direction

    found = run(OPTIMIZERS["muon"])
    first = run(dataclasses.replace(OPTIMIZERS["muon"], weight_decay=0.0), GRADIENTS[:1])
    for path in SHAPES:
        close(found[path], reference(muon() if path in DECAYED else adam_of(path), path), path, atol=1e-4)
        if path in DECAYED:
            # The update is orthogonal, nearly: singular values between 0.5 and 1.5 (times its scale).
            moved = (WEIGHTS[path] - first[path]) / schedule(0)
            values = np.linalg.svd(moved, compute_uv=False) / (0.3 * np.sqrt(max(SHAPES[path][-2:])))
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
    found = run(dataclasses.replace(OPTIMIZERS["adamw"], decay_adapters=True))
    for leaf, decay in (("lora_a", 0.3), ("lora_b", 0.3), ("magnitude", 0.0)):
        path = f"layers/attention/q/{leaf}"
        close(found[path], reference(adam_of(path), path, decay=decay), path)


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
    assert group_of("layers/mlp/shared/gate/kernel") == "matrices"
    assert group_of("layers/mlp/shared_gate/kernel") == "others"
