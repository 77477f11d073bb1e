"""The step and the loop: freezing, accumulation, averaging, the loss, and continuing bit for bit."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_inputs import losses, training

from cpt_jax.adapt import ByPath, Embeddings, Expand, Full, LoRA
from cpt_jax.checkpoint.train_state import read_trained
from cpt_jax.core.precision import Precision
from cpt_jax.core.tree import flatten, partition
from cpt_jax.models.cross_entropy import TableUse, token_losses
from cpt_jax.models.decoder import abstract_decoder, apply, logits
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.optim.schedules import Constant, Cosine, WarmupStableDecay
from cpt_jax.optim.skipping import skip_bad_steps
from cpt_jax.sharding.mesh import MeshShape, make_mesh
from cpt_jax.training.loop import train
from cpt_jax.training.loss import make_loss
from cpt_jax.training.state import initial_state
from cpt_jax.training.step import Controls, make_train_step

METHODS = {
    "embeddings": Embeddings(rows="new"),
    "all rows": Embeddings(rows="all"),
    "lora": LoRA(rank=4, alpha=8),
    "lora without rows": LoRA(rank=4, alpha=8, targets=("q", "down"), new_rows=False),
    "dora, rank-stabilised": LoRA(rank=4, alpha=8, targets=("q", "down"), dora=True, scaling="alpha/sqrt(rank)"),
    "lora and norms, dropping": LoRA(rank=4, alpha=8, targets=("layers/mlp/*",), norms=True, dropout=0.2),
    "lora of other ranks": LoRA(rank=4, alpha=8, rank_pattern={"layers/mlp/*": 2}, alpha_pattern={"q": 3.0}),
    "by path": ByPath(patterns=("layers/*/o/kernel", "final_norm/scale")),
    "one layer": ByPath(patterns=("layers/*", "embed/new"), layers=(1, 2)),
    "added block": Expand(blocks=1),
    "full": Full(),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_does_not_train_is_bit_identical_and_the_rest_moves(directories, tmp_path, method):
    run = training(directories, tmp_path, method, steps=6)
    before = jax.tree.map(np.copy, run.weights)
    returned = train(run)
    trained = flatten(read_trained(tmp_path / "checkpoints")["last"])
    jax.tree.map(np.testing.assert_array_equal, returned, read_trained(tmp_path / "checkpoints"))
    expected, frozen = partition(before, method.trains)
    assert trained.keys() == flatten(expected).keys()
    for path, leaf in trained.items():
        assert leaf.dtype == np.float32
        assert (leaf != flatten(expected)[path]).any(), path
    # Frozen leaves are not in the checkpoint at all; the ones given are untouched.
    for path, leaf in flatten(partition(run.weights, method.trains)[1]).items():
        np.testing.assert_array_equal(leaf, flatten(frozen)[path])


def test_an_interrupted_run_ends_bit_for_bit_like_a_whole_one(directories, tmp_path):
    method = LoRA(rank=4, alpha=8, dropout=0.2)
    train(training(directories, tmp_path / "whole", method))

    class Killed(Exception):
        pass

    interrupted = training(directories, tmp_path / "cut", method, checkpoint_seconds=0.0)
    draw = iter(interrupted.loader)

    class Dying:
        count = 0

        def __getattr__(self, name):
            return getattr(interrupted.loader, name)

        def __next__(self):
            self.count += 1
            if self.count == 6:
                raise Killed
            return next(draw)

    with pytest.raises(Killed):
        train(dataclasses.replace(interrupted, loader=Dying()))
    # A save that was cut off leaves a directory that is no checkpoint.
    newest = max(int(path.name) for path in (tmp_path / "cut" / "checkpoints").iterdir() if path.name.isdigit())
    assert 0 < newest < 8
    half = tmp_path / "cut" / "checkpoints" / f"{newest + 1}.orbax-checkpoint-tmp-0"
    shutil.copytree(tmp_path / "cut" / "checkpoints" / str(newest), half)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    train(training(directories, tmp_path / "cut", method))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = (read_trained(tmp_path / name / "checkpoints") for name in ("whole", "cut"))
    for kind in ("last", "ema"):
        for path, leaf in flatten(whole[kind]).items():
            np.testing.assert_array_equal(leaf, flatten(cut[kind])[path])


@pytest.mark.parametrize(
    "method",
    [LoRA(rank=4, alpha=8), LoRA(rank=4, dora=True, dropout=0.2), Expand(blocks=2), Full(), Embeddings(rows="new")],
    ids=["lora", "dora, dropping", "added blocks", "full", "new rows"],
)
def test_eight_devices_give_the_losses_of_one(directories, tmp_path, method):
    for devices in (1, 8):
        train(training(directories, tmp_path / str(devices), method, devices=devices))
    np.testing.assert_allclose(losses(tmp_path / "8"), losses(tmp_path / "1"), rtol=1e-4)


@pytest.mark.parametrize("sizes", [dict(fsdp=4, tensor=2), dict(replica=2, fsdp=2, tensor=2)], ids=str)
def test_vocabulary_and_heads_cut_over_devices_give_the_losses_of_one(directories, tmp_path, sizes):
    for name, mesh in (("one", make_mesh(jax.devices()[:1])), ("cut", make_mesh(shape=MeshShape(**sizes)))):
        train(training(directories, tmp_path / name, Full(), mesh=mesh, steps=4))
    np.testing.assert_allclose(losses(tmp_path / "cut"), losses(tmp_path / "one"), rtol=1e-4)


def test_accumulation_is_the_same_step(directories, tmp_path):
    for parts in (1, 4):
        train(training(directories, tmp_path / str(parts), Full(), accumulate=parts, steps=4))
    np.testing.assert_allclose(losses(tmp_path / "4"), losses(tmp_path / "1"), rtol=1e-4)
    one, four = (flatten(read_trained(tmp_path / name / "checkpoints")["last"]) for name in ("1", "4"))
    for path, leaf in one.items():
        # A gradient of nearly zero may have another sign, and Adam's steps go by signs.
        assert np.linalg.norm(four[path] - leaf) <= 2e-3 * np.linalg.norm(leaf), path


def test_bfloat16_follows_float32(directories, tmp_path):
    for compute in ("float32", "bfloat16"):
        train(training(directories, tmp_path / compute, LoRA(rank=4, alpha=8), precision=Precision(compute=compute)))
    np.testing.assert_allclose(losses(tmp_path / "bfloat16"), losses(tmp_path / "float32"), rtol=0.02)


def test_the_optimizer_sees_only_what_trains(directories, tmp_path):
    method = LoRA(rank=4, alpha=8)
    run = training(directories, tmp_path, method)
    trainable, _ = partition(run.weights, method.trains)
    state = run.optimizer.build(trainable).init(trainable)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in flatten(trainable).values())


def test_the_average_is_that_of_float64():
    generator = np.random.default_rng(0)
    ema = EMA(decay=0.8)
    values = generator.normal(size=(11, 5)).astype(np.float32)
    average, expected = {"x": jnp.asarray(values[0])}, values[0].astype(np.float64)
    for step in range(10):
        average = ema.after(average, {"x": jnp.asarray(values[step + 1])}, jnp.asarray(step))
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * values[step + 1]
    np.testing.assert_allclose(average["x"], expected, rtol=1e-5)


@pytest.mark.parametrize("every", [1, 3])
def test_an_average_is_moved_on_its_steps_by_the_steps_that_were_taken(every):
    """Against a loop over NumPy, with bad steps where it is to be moved, between, and as many as there are from one move
    to the next; the weights are never those of a bad step."""
    bad, decay, rate = {3, 5, 7, 8, 9}, 0.6, 0.1
    optimizer, ema = skip_bad_steps(optax.scale(1.0), None), EMA(decay=decay, every=every)

    def loss(weights, batch, key, held):
        return (batch["pull"] * weights["x"]).sum(), {"tokens": jnp.ones(1)}

    step = jax.jit(make_train_step(loss, optimizer, ema))
    state = initial_state({"x": jnp.ones(2)}, optimizer, with_average=True)
    weights, average = np.ones(2), np.ones(2)
    taken_since = False
    for number in range(1, 14):
        pull = np.array([number, -2.0 * number], np.float32)
        batch = {"pull": jnp.asarray(pull * (np.nan if number in bad else 1))}
        # A run that is continued has this state and no other.
        state, _ = step(jax.tree.map(jnp.asarray, jax.device_get(state)), {}, {}, batch, Controls(np.float32(rate)))
        if number not in bad:
            weights, taken_since = weights - rate * pull, True
        if number % every == 0 and taken_since:
            share = min(decay, number / (9 + number)) ** every
            average, taken_since = share * average + (1 - share) * weights, False
        np.testing.assert_allclose(state.trainable["x"], weights, rtol=1e-5)
        np.testing.assert_allclose(state.average["x"], average, rtol=1e-5, err_msg=f"step {number}")


def test_a_step_in_parts_is_that_of_the_formula_and_each_part_of_each_step_draws_anew():
    def loss(weights, batch, key, held):
        place = batch["place"].sum(0)
        return (place * weights["x"]).sum(), {"tokens": 2 * place, "drawn": place * jax.random.uniform(key)}

    optimizer = optax.add_decayed_weights(0.5)
    step = jax.jit(make_train_step(loss, optimizer, None, accumulate=2))
    start, rows = initial_state({"x": jnp.array([3.0, 5.0])}, optimizer, False), {"place": jnp.eye(2)}

    def draws(seed):
        controls = Controls(np.float32(0.1), seed=np.uint32(seed))
        first, of_first = step(start, {}, {}, rows, controls)
        of_second = step(first, {}, {}, rows, controls)[1]
        assert of_first["loss"] == (3 + 5) / 4
        assert of_first["learning_rate"] == np.float32(0.1)
        # Of the gradient, 1/4 for either weight, and not of what the optimizer makes of it.
        assert of_first["gradient_norm"] == pytest.approx(8**-0.5)
        np.testing.assert_allclose(first.trainable["x"], [3 - 0.1 * (0.25 + 1.5), 5 - 0.1 * (0.25 + 2.5)], rtol=1e-6)
        return [*of_first["drawn"].tolist(), *of_second["drawn"].tolist()]

    assert len({*draws(0), *draws(1)}) == 8
    assert draws(0) == draws(0)
    # Without a token to learn there is nothing to learn, and no 0 / 0.
    nothing, metrics = step(start, {}, {}, {"place": jnp.zeros((2, 2))}, Controls(np.float32(0.1)))
    assert metrics["loss"] == 0
    np.testing.assert_allclose(nothing.trainable["x"], 0.95 * start.trainable["x"], rtol=1e-6)


def test_a_row_that_is_not_in_the_batch_hardly_moves():
    optimizer = AdamW(learning_rate=1e-2, new_rows_epsilon=1e-4)
    weights = {"embed": {"new": jnp.zeros((2, 4))}}
    transform = optax.chain(optimizer.build(weights), optax.scale_by_learning_rate(1e-2))
    gradients = {"embed": {"new": jnp.stack([jnp.full((4,), 2e-3), jnp.full((4,), 1e-7)])}}
    updates, _ = transform.update(gradients, transform.init(weights), weights)
    present, absent = np.abs(updates["embed"]["new"]).mean(1)
    assert present > 0.9e-2
    assert absent < 1e-4


@pytest.mark.parametrize("schedule", [Constant(), Cosine(), WarmupStableDecay()])
def test_schedules_rewarm_reach_their_peak_and_end(schedule):
    rates = np.array([schedule.build(2.0, 100)(step) for step in range(100)])
    assert 0 < rates[0] < 0.5
    assert rates.max() == pytest.approx(2.0, rel=1e-3)
    assert (np.diff(rates[:5]) > 0).all()
    assert rates[-1] == pytest.approx(2.0 if isinstance(schedule, Constant) else 0.1, rel=1e-3)


class TestCrossEntropy:
    """The chunked loss and its own gradient against a plain float64 computation."""

    def inputs(self, tokens=700, width=24, rows=(50, 13)):
        generator = np.random.default_rng(0)
        hidden = generator.normal(size=(tokens, width))
        tables = tuple(generator.normal(size=(count, width)) for count in rows)
        return hidden, tables, generator.integers(0, sum(rows), tokens), generator.integers(0, 2, tokens) * 1.5

    def reference(self, hidden, tables, targets, weights):
        logits = np.concatenate([hidden @ table.T for table in tables], axis=1)
        probabilities = np.exp(logits - logits.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        losses = -np.log(probabilities[np.arange(len(targets)), targets])
        dlogits = probabilities
        dlogits[np.arange(len(targets)), targets] -= 1
        dlogits *= weights[:, None]
        whole = np.concatenate(tables)
        dtable = dlogits.T @ hidden
        return (losses * weights).sum(), losses, dlogits @ whole, (dtable[: len(tables[0])], dtable[len(tables[0]) :])

    def test_value_and_gradients(self):
        hidden, tables, targets, weights = self.inputs()
        total, losses, dhidden, dtables = self.reference(hidden, tables, targets, weights)

        def uses(*trains):
            return tuple(TableUse(len(table), wanted) for table, wanted in zip(tables, trains, strict=True))

        def objective(hidden, tables, uses):
            arguments = (jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32), "float32", uses)
            return 2 * token_losses(hidden, tables, *arguments)[0]

        low = jnp.asarray(hidden, jnp.float32), tuple(jnp.asarray(table, jnp.float32) for table in tables)
        value, (first, second) = jax.value_and_grad(objective, argnums=(0, 1))(*low, uses(True, True))
        np.testing.assert_allclose(value, 2 * total, rtol=1e-5)
        np.testing.assert_allclose(first, 2 * dhidden, atol=1e-4)
        for mine, reference in zip(second, dtables, strict=True):
            np.testing.assert_allclose(mine, 2 * reference, atol=1e-3)
        _, (_, frozen) = jax.value_and_grad(objective, argnums=(0, 1))(*low, uses(False, True))
        np.testing.assert_array_equal(frozen[0], 0)
        np.testing.assert_allclose(frozen[1], 2 * dtables[1], atol=1e-3)
        _, each, _ = token_losses(
            *low, jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32), "float32", uses(False, False)
        )
        np.testing.assert_allclose(each, losses, rtol=1e-4, atol=1e-5)


def test_metrics_by_domain_add_up_and_gradients_are_of_the_mean(directories, tmp_path):
    run = training(directories, tmp_path, Full())
    batch = jax.tree.map(jnp.asarray, next(run.loader))
    trainable = jax.tree.map(jnp.asarray, run.weights)
    loss = make_loss(run.network, "float32", run.trains, ("zh", "en"))
    plain = optax.identity()
    step = make_train_step(loss, plain, None)
    state, metrics = jax.jit(step)(initial_state(trainable, plain, False), {}, {}, batch, Controls(np.float32(1)))
    assert metrics["tokens"].sum() == batch["weights"].sum()
    assert metrics["loss"] == pytest.approx(float(metrics["nats"].sum() / metrics["tokens"].sum()), rel=1e-5)
    moved = jax.tree.map(lambda a, b: b - a, state.trainable, trainable)
    assert optax.tree.norm(moved) == pytest.approx(float(metrics["gradient_norm"]), rel=1e-3)


def test_the_loss_has_the_model_s_cap_and_the_stage_s_z_loss(directories, tmp_path):
    run = training(directories, tmp_path, Full())
    config, batch = dataclasses.replace(run.network.config, logit_softcap=1.5), next(run.loader)
    network = abstract_decoder(config)
    loss = make_loss(network, "float32", run.trains, ("zh", "en"), z_loss=0.1)

    @jax.jit
    def both(weights, batch):
        hidden = apply(
            network, weights, batch["inputs"], batch["positions"], batch["segment_ids"], compute_dtype="float32"
        )
        scores = logits(network, weights, hidden, compute_dtype="float32")
        log_normaliser = jax.nn.logsumexp(scores, axis=-1)
        nats = optax.softmax_cross_entropy_with_integer_labels(scores, batch["targets"])
        return loss(weights, batch)[0], (batch["weights"] * (nats + 0.1 * log_normaliser**2)).sum()

    found, expected = both(jax.tree.map(jnp.asarray, run.weights), batch)
    assert found == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("kind", "dora"), [("int8", False), ("nf4", True)])
def test_quantised_frozen_kernels_train_the_adapters_nearly_as_well(directories, tmp_path, kind, dora):
    method, steps = LoRA(rank=4, alpha=8, dora=dora), 6
    train(training(directories, tmp_path / "whole", method, steps=steps))
    few_bits = Precision(compute="float32", frozen_kernels=kind)
    train(training(directories, tmp_path / "few", method, steps=steps, precision=few_bits, devices=4))
    whole, few = losses(tmp_path / "whole"), losses(tmp_path / "few")
    assert whole != few
    np.testing.assert_allclose(few, whole, rtol=0.02 if kind == "int8" else 0.15)
