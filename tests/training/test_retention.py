"""Mean teacher, anchor and L2 to the start against a reference in float64 over ten steps; and that they hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inputs import random_weights, tiny_config

from cpt_jax.adapt import Full, LoRA
from cpt_jax.core.config import from_json, to_json
from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import combine, flatten, partition, unflatten
from cpt_jax.models.decoder import abstract_decoder, apply, logits
from cpt_jax.optim.averaging import EMA
from cpt_jax.recipe.model import Model
from cpt_jax.training.loss import make_loss
from cpt_jax.training.retention import (
    Anchor,
    L2ToStart,
    MeanTeacher,
    Retention,
    check_retention,
    start_of,
    teacher_weight,
)
from cpt_jax.training.state import initial_state
from cpt_jax.training.step import Controls, make_train_step

STEPS, RATE, DECAY = 10, 0.05, 0.5
NAMES = ("new", "old")
SMALL = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_heads=2, num_kv_heads=1, num_layers=1, new_rows=6)
OF_ADAPTERS = ("lora_a", "lora_b", "magnitude", "kernel_norm")
PARTS = {
    "mean teacher": (Full(), MeanTeacher(weight=0.7, warmup=0.4)),
    "mean teacher of one domain": (Full(), MeanTeacher(weight=0.7, domains=("old",), warmup=0.0)),
    "anchor": (Full(), Anchor(weight=0.5, warmup=0.2)),
    "anchor under LoRA": (LoRA(rank=2, alpha=4), Anchor(weight=0.5, domains=("old",), warmup=0.0)),
    "anchor under DoRA": (LoRA(rank=2, alpha=4, dora=True), Anchor(weight=0.5, warmup=0.0)),
    "L2": (Full(), L2ToStart(weight=0.3)),
    "L2 under LoRA": (LoRA(rank=2, alpha=4), L2ToStart(weight=0.3)),
}


def batch(rows: int = 4, length: int = 12) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    whole = {name: generator.integers(0, 46, (rows, length)) for name in ("inputs", "targets")}
    whole |= {"positions": np.broadcast_to(np.arange(length), (rows, length)), "segment_ids": np.ones((rows, length))}
    whole |= {"domains": np.broadcast_to((np.arange(rows) % 2)[:, None], (rows, length))}
    arrays = {name: array.astype(np.int32) for name, array in whole.items()}
    return arrays | {"weights": (generator.random((rows, length)) < 0.8).astype(np.float32)}


def adapted(config, method) -> dict:
    """Random weights with adapters that change something."""
    model = Model(config=config, weights=random_weights(config), hf_config={}).adapted(method, 0)
    generator = np.random.default_rng(0)

    def leaf(path, array):
        return (
            generator.normal(0, 0.2, array.shape).astype(np.float32) if path.endswith("lora_b") else np.asarray(array)
        )

    return unflatten({path: leaf(path, array) for path, array in flatten(model.weights).items()})


def reference(config, method, part, weights, data) -> dict[str, np.ndarray]:
    """Plain gradient descent on the same objective, written out, in float64."""
    lora = method.lora_config()
    network, base_network = abstract_decoder(config, lora), abstract_decoder(config)
    trainable, frozen = partition(weights, method.trains)

    def distribution(network, weights):
        arguments = (data["inputs"], data["positions"], data["segment_ids"])
        hidden = apply(network, weights, *map(jnp.asarray, arguments), compute_dtype="float64")
        return logits(network, weights, hidden, compute_dtype="float64")

    def objective(trainable, average, step):
        whole = combine(trainable, frozen)
        scores = distribution(network, whole)
        nats = optax.softmax_cross_entropy_with_integer_labels(scores, data["targets"])
        count = data["weights"].sum()
        total = (nats * data["weights"]).sum() / count
        if isinstance(part, L2ToStart):
            start = flatten(partition(weights, method.trains)[0])
            far = [
                ((leaf - start[path]) ** 2).sum()
                for path, leaf in flatten(trainable).items()
                if not path.endswith(OF_ADAPTERS)
            ]
            return total + part.weight / 2 * sum(far)
        if isinstance(part, MeanTeacher):
            wise, mine = distribution(network, combine(average, frozen)), scores
        else:
            plain = {path: leaf for path, leaf in flatten(weights).items() if not path.endswith(OF_ADAPTERS)}
            wise, mine = distribution(base_network, unflatten(plain))[..., :40], scores[..., :40]
        p, q = jax.nn.log_softmax(wise), jax.nn.log_softmax(mine)
        divergence = (jnp.exp(p) * (p - q)).sum(-1) * data["weights"]
        if part.domains is not None:
            divergence = divergence * (data["domains"] == 1)
        risen = jnp.minimum(1.0, (step + 1) / max(1, round(part.warmup * STEPS)))
        return total + part.weight * risen * divergence.sum() / count

    average, gradient_of = trainable, jax.jit(jax.grad(objective))
    for step in range(STEPS):
        gradient = gradient_of(trainable, average, step)
        trainable = jax.tree.map(lambda w, g: w - RATE * g, trainable, gradient)
        decay = min(DECAY, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, w: decay * a + (1 - decay) * w, average, trainable)  # noqa: B023
    return jax.tree.map(np.asarray, flatten(trainable) | {f"average/{p}": leaf for p, leaf in flatten(average).items()})


@pytest.mark.parametrize(("method", "part"), PARTS.values(), ids=PARTS)
def test_ten_steps_are_those_of_float64(method, part):
    config, data = tiny_config(**SMALL), batch()
    weights = adapted(config, method)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), weights)
        expected = reference(config, method, part, exact, data)

    network = abstract_decoder(config, method.lora_config())
    trainable, frozen = partition(jax.tree.map(jnp.asarray, weights), method.trains)
    loss = make_loss(network, "float32", method.trains, NAMES, retention=(part,))
    optimizer = optax.identity()
    step = jax.jit(make_train_step(loss, optimizer, EMA(decay=DECAY)))
    start = start_of(trainable, (part,))
    state = initial_state(trainable, optimizer, True)
    for number in range(STEPS):
        taught = np.float32(teacher_weight((part,), number, STEPS))
        state, metrics = step(state, frozen, start, data, Controls(np.float32(RATE), taught))
    assert ("divergence" in metrics) == (not isinstance(part, L2ToStart))
    if not isinstance(part, L2ToStart):
        divergence = metrics["divergence"] if part.domains is None else metrics["divergence"][NAMES.index("old")]
        total = metrics["nats"].sum() + taught * divergence.sum()
        assert metrics["loss"] * metrics["tokens"].sum() == pytest.approx(float(total), rel=1e-5)
    found = flatten(state.trainable) | {f"average/{path}": leaf for path, leaf in flatten(state.average).items()}
    for path, leaf in found.items():
        moved = np.abs(expected[path] - flatten(weights)[path.removeprefix("average/")]).max()
        np.testing.assert_allclose(leaf, expected[path], atol=2e-3 * moved + 1e-6, err_msg=path)


def test_parts_are_checked_and_saved():
    for parts, mixture, ema, message in (
        ((MeanTeacher(), Anchor()), ("a",), True, "give one teacher"),
        ((L2ToStart(weight=0.1), L2ToStart(weight=0.2)), ("a",), True, "one L2ToStart at most"),
        ((MeanTeacher(),), ("a",), False, "needs the stage's EMA"),
        ((Anchor(domains=("b",)),), ("a",), True, "names the domain 'b'; the stage mixes a"),
    ):
        with pytest.raises(UserError, match=message):
            check_retention(parts, mixture, ema)
    for make, message in (
        (lambda: L2ToStart(weight=0.0), "L2ToStart.weight is 0.0"),
        (lambda: Anchor(weight=0.0), "Anchor.weight is 0.0"),
        (lambda: MeanTeacher(warmup=1.5), "MeanTeacher.warmup is 1.5"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    part = Anchor(weight=0.5, domains=("old",))
    assert from_json(Retention, to_json(part)) == part
    assert dataclasses.replace(part, weight=1.0).weight == 1.0


def test_under_lora_the_anchor_keeps_no_second_copy():
    config = tiny_config(**SMALL)
    method = LoRA(rank=2, alpha=4, new_rows=False)
    trainable, _ = partition(random_weights(config, lora=method.lora_config()), method.trains)
    assert start_of(trainable, (Anchor(),)) == {}
    assert flatten(start_of({"embed": {"new": np.zeros(3)}} | trainable, (Anchor(),))).keys() == {"embed/new"}


def test_the_start_outlives_the_weights_that_a_step_is_given():
    weights = {"embed": {"new": jnp.arange(3.0)}}
    start = start_of(weights, (L2ToStart(weight=0.1),))
    # As a step does, which puts its results in their place.
    weights["embed"]["new"].delete()
    np.testing.assert_array_equal(start["embed"]["new"], [0, 1, 2])
