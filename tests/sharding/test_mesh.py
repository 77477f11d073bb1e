"""Shapes of meshes: what is asked for, what is taken unasked, and what is refused."""

import types

import jax
import pytest

from cpt_jax.adapt import Full
from cpt_jax.core.errors import UserError
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.recipe.recipe import Stage
from cpt_jax.sharding.mesh import MeshShape, make_mesh, preset


def test_fsdp_takes_what_the_other_axes_leave():
    mesh = make_mesh(shape=MeshShape.parse("tensor=2, context=2"))
    assert dict(mesh.shape) == {"replica": 1, "fsdp": 2, "expert": 1, "context": 2, "tensor": 2}
    assert dict(make_mesh().shape)["fsdp"] == len(jax.devices())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdp=3", "mesh replica 1 x fsdp 3 x expert 1 x context 1 x tensor 1 does not cover 8 devices"),
        ("tensor=3", "does not cover 8 devices: choose sizes whose product is 8"),
        ("fsdp=0", "mesh axis fsdp is 0: give at least 1"),
        ("data=8", "'data=8' is no axis=size; axes are replica, fsdp, expert, context, tensor"),
        ("fsdp=4;tensor=2", "is no axis=size"),
    ],
)
def test_a_shape_that_is_none_is_refused_in_one_line(text, message):
    with pytest.raises(UserError, match=message):
        MeshShape.parse(text).over(8)


def on(slices: int, each: int) -> list:
    return [types.SimpleNamespace(slice_index=index // each) for index in range(slices * each)]


@pytest.mark.parametrize(
    ("devices", "rows", "length", "expected"),
    [
        (on(1, 8), 16, 512, MeshShape(fsdp=8)),
        # Rows for half of them: each row is cut in two.
        (on(1, 8), 4, 512, MeshShape(fsdp=4, context=2)),
        (on(2, 4), 16, 512, MeshShape(replica=2, fsdp=4)),
        (on(1, 1), 3, 100, MeshShape(fsdp=1)),
    ],
    ids=str,
)
def test_the_shape_taken_unasked_gives_every_device_a_part(devices, rows, length, expected):
    shape = preset(devices, rows, length)
    assert shape == expected
    stage(rows, length).check_mesh(shape.over(len(devices)))


def stage(rows: int, length: int, **settings) -> Stage:
    shape = dict(batch_size=rows, sequence_length=length, tokens=1, optimizer=AdamW(learning_rate=1e-3))
    return Stage(name="full", method=Full(), mixture={"text": 1.0}, **(shape | settings))


def test_what_does_not_divide_is_refused_with_the_axis_and_the_sizes():
    with pytest.raises(UserError, match="3 rows of 100 tokens do not divide over 8 devices"):
        preset(on(1, 8), 3, 100)
    with pytest.raises(UserError, match=r"12 rows in 3 parts of 4 .* replica 2 x fsdp 4 x expert 1 \(= 8\)"):
        stage(12, 64, accumulate=3).check_mesh(MeshShape(replica=2, fsdp=4))
    with pytest.raises(UserError, match="rows of 100 tokens do not divide over the mesh's context 8"):
        stage(8, 100).check_mesh(MeshShape(fsdp=1, context=8))
