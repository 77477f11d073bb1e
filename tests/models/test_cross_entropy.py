"""Losses over the vocabulary against a float64 reference: cross-entropy, z-loss and divergence from a teacher, and
their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from cpt_jax.models import cross_entropy
from cpt_jax.models.cross_entropy import TableUse, Teacher, token_losses
from cpt_jax.models.cut_vocabulary import TABLES, looked_up
from cpt_jax.sharding.mesh import MeshShape, make_mesh
from cpt_jax.sharding.rules import partition_spec

TOKENS, WIDTH = 41, 12
# Rows of the two tables and how many of them are tokens: the rest is padding.
ROWS, USED = (24, 16), (21, 9)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last one not full."""
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", 16)


def inputs(seed: int = 0):
    generator = np.random.default_rng(seed)
    hidden = generator.normal(size=(TOKENS, WIDTH))
    tables = tuple(generator.normal(size=(rows, WIDTH)) for rows in ROWS)
    return hidden, tables


def naive(hidden, tables, targets, weights, softcap, z_loss, teacher):
    """The same in a plain way, for jax.grad in float64."""

    def logits(hidden, tables):
        scores = jnp.concatenate([hidden @ t[:used].T for t, used in zip(tables, USED, strict=False)], axis=1)
        return scores if softcap is None else softcap * jnp.tanh(scores / softcap)

    scores = logits(hidden, tables)
    log_normaliser = jax.nn.logsumexp(scores, axis=1)
    nats = log_normaliser - scores[jnp.arange(TOKENS), targets]
    total = jnp.sum(weights * (nats + z_loss * log_normaliser**2))
    if teacher is None:
        return total, (nats, jnp.zeros_like(nats))
    theirs = jax.nn.log_softmax(logits(teacher.hidden, teacher.tables))
    mine = jax.nn.log_softmax(scores[:, : theirs.shape[1]])
    divergence = jnp.sum(jnp.exp(theirs) * (theirs - mine), axis=1)
    return total + jnp.sum(teacher.weights * divergence), (nats, divergence)


CASES = {
    "cross-entropy": (None, 0.0, 0),
    "softcap": (3.0, 0.0, 0),
    "z-loss": (None, 0.01, 0),
    "teacher over both tables": (None, 0.0, 2),
    "teacher over the base's table": (None, 0.0, 1),
    "everything": (4.0, 0.02, 1),
}


@pytest.mark.parametrize(("softcap", "z_loss", "teacher_tables"), CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_float64(softcap, z_loss, teacher_tables):
    hidden, tables = inputs()
    generator = np.random.default_rng(1)
    targets, weights = generator.integers(0, sum(USED), TOKENS), generator.uniform(0, 2, TOKENS)
    wise = inputs(2)
    teacher = Teacher(wise[0], wise[1][:teacher_tables], generator.uniform(0, 2, TOKENS)) if teacher_tables else None
    with jax.enable_x64(True):
        exact = jax.tree.map(jnp.asarray, (hidden, tables, teacher))
        reference = jax.value_and_grad(
            lambda h, t: naive(h, t, targets, weights, softcap, z_loss, exact[2]), argnums=(0, 1), has_aux=True
        )
        (total, (nats, divergence)), (dhidden, dtables) = jax.tree.map(np.asarray, reference(*exact[:2]))

    uses = tuple(TableUse(used, True) for used in USED)
    low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (hidden, tables, weights, teacher))

    def objective(hidden, tables):
        losses = token_losses(
            hidden, tables, jnp.asarray(targets), low[2], "float32", uses, softcap, z_loss=z_loss, teacher=low[3]
        )
        return 3 * losses.total, losses

    (value, losses), gradients = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))(*low[:2])
    np.testing.assert_allclose(value, 3 * total, rtol=1e-5)
    np.testing.assert_allclose(losses.nats, nats, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(losses.divergence, divergence, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients[0], 3 * dhidden, atol=1e-5 * np.abs(dhidden).max())
    for mine, expected in zip(gradients[1], dtables, strict=True):
        np.testing.assert_allclose(mine, 3 * expected, atol=1e-5 * np.abs(expected).max())
    # Without a gradient the values are the same.
    plain = jax.jit(objective)(*low[:2])[1]
    np.testing.assert_allclose(plain.total, total, rtol=1e-5)
    np.testing.assert_allclose(plain.divergence, divergence, rtol=1e-4, atol=1e-5)


def test_a_teacher_who_agrees_costs_nothing():
    hidden, tables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), inputs())
    uses = tuple(TableUse(used, True) for used in USED)
    arguments = jnp.zeros(TOKENS, jnp.int32), jnp.zeros(TOKENS), "float32", uses
    teacher = Teacher(hidden, tables, jnp.ones(TOKENS))
    gradient = jax.grad(lambda h: token_losses(h, tables, *arguments, teacher=teacher).total)(hidden)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(fsdp=2, context=2, tensor=2),
        dict(replica=2, fsdp=4),
        # 24 rows over 4 devices; 16 new ones on each.
        dict(fsdp=2, tensor=4),
        # The width does not divide.
        dict(fsdp=8),
    ],
    ids=str,
)
@pytest.mark.parametrize("teacher_tables", [0, 1, 2])
def test_on_a_mesh_each_device_takes_its_own_tokens_and_rows(sizes, teacher_tables):
    generator = np.random.default_rng(1)
    shape = (8, 6)
    drawn = (generator.normal(size=(*shape, WIDTH)), *inputs()[1], generator.uniform(0, 2, shape))
    hidden, base, new, weights = (jnp.asarray(each, jnp.float32) for each in drawn)
    targets = jnp.asarray(generator.integers(0, sum(USED), shape))
    wise = jnp.asarray(generator.normal(size=(*shape, WIDTH)), jnp.float32)
    uses = (TableUse(USED[0], True), TableUse(USED[1], True))

    def objective(hidden, tables):
        teacher = Teacher(wise, tables[:teacher_tables], 2 - weights) if teacher_tables else None
        losses = token_losses(
            hidden, tables, targets, weights, "float32", uses, 4.0, z_loss=0.02, teacher=jax.lax.stop_gradient(teacher)
        )
        return losses.total, losses

    gradient = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    expected = jax.jit(gradient)(hidden, (base, new))
    mesh = make_mesh(shape=MeshShape(**sizes))
    rows, table = (("batch", "sequence", "hidden"), hidden), (("vocab", "embed"), base)
    placed = [
        jax.device_put(array, NamedSharding(mesh, partition_spec(names, array.shape, mesh)))
        for names, array in (rows, table, (("new_vocab", "embed"), new))
    ]
    with jax.set_mesh(mesh):
        found = jax.jit(gradient)(placed[0], tuple(placed[1:]))
        values = jax.jit(objective)(placed[0], tuple(placed[1:]))
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-5, atol=1e-5 * float(jnp.abs(right).max()))
    for mine, right in zip(jax.tree.leaves(values), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-5, atol=1e-5)
    # The table's gradient lies as the table does.
    assert found[1][1][0].sharding.is_equivalent_to(placed[1].sharding, 2)


@pytest.mark.parametrize(
    ("sizes", "batch", "width"),
    [
        (dict(fsdp=2, context=2, tensor=2), 8, 12),
        (dict(replica=2, fsdp=4), 8, 12),
        (dict(expert=2, tensor=4), 8, 12),
        # Neither the width nor the rows divide.
        (dict(fsdp=8), 8, 12),
        (dict(fsdp=4, tensor=2), 3, 12),
    ],
    ids=str,
)
def test_on_a_mesh_each_device_looks_up_in_the_part_that_it_has(sizes, batch, width):
    generator = np.random.default_rng(0)
    table = jnp.asarray(generator.normal(size=(24, width)), jnp.float32)
    tokens = jnp.asarray(generator.integers(0, 24, (batch, 6)))
    wanted = jnp.asarray(generator.normal(size=(batch, 6, width)), jnp.float32)
    gradient = jax.value_and_grad(lambda table: (looked_up(table, tokens, 0) * wanted).sum())
    expected = jax.jit(gradient)(table)
    mesh = make_mesh(shape=MeshShape(**sizes))
    where = NamedSharding(mesh, partition_spec(TABLES[0], table.shape, mesh))
    with jax.set_mesh(mesh):
        found = jax.jit(gradient)(jax.device_put(table, where))
        text = jax.jit(gradient).lower(jax.device_put(table, where)).compile().as_text()
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
    assert found[1].sharding.is_equivalent_to(where, 2)
    if where.spec[1] is not None and batch == 8:
        # The table itself goes nowhere.
        assert "f32[24,12]" not in text
