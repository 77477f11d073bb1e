"""Compiled programs read: loops, products and collectives of programs whose counts are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cpt_jax.plan.collectives import axes_of, collectives
from cpt_jax.plan.hlo import Instruction, parse
from cpt_jax.plan.roofline import moved_bytes, products
from cpt_jax.sharding.mesh import AXES, MeshShape, make_mesh


def compiled(function, mesh, *arguments):
    """The text of a program; arguments are (shape, the mesh's axes)."""
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
        for shape, axes in arguments
    ]
    with jax.set_mesh(mesh):
        return parse(jax.jit(function).lower(*shapes).compile().as_text())


def test_a_loop_multiplies_what_is_in_it():
    def looped(x, weights):
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]

    program = compiled(looped, make_mesh(jax.devices()[:1]), ((8, 16), ()), ((5, 16, 16), ()))
    assert products(program) == 5 * 2 * 8 * 16 * 16


@pytest.mark.parametrize(
    ("axes", "kind", "devices", "sent"),
    [
        # A float32 array of 1024 x 64, cut in 4 along its rows: gathered, each device sends three quarters of it.
        (("fsdp",), "all-gather", 4, 1024 * 64 * 4 * 3 / 4),
        (("tensor",), "all-gather", 2, 1024 * 64 * 4 / 2),
        (("fsdp", "tensor"), "all-gather", 8, 1024 * 64 * 4 * 7 / 8),
    ],
)
def test_a_gather_goes_along_the_axes_that_cut_the_array(axes, kind, devices, sent):
    mesh = make_mesh(shape=MeshShape(fsdp=4, tensor=2))

    def gathered(x):
        return jax.lax.with_sharding_constraint(jnp.sin(x), PartitionSpec())

    (found,) = collectives(compiled(gathered, mesh, ((1024, 64), (axes,))), dict(mesh.shape))
    assert (found.kind, found.axes, found.devices, found.count) == (kind, axes, devices, 1)
    assert found.sent == pytest.approx(sent)


def test_a_sum_in_a_loop_is_counted_as_often_as_it_runs():
    mesh = make_mesh(shape=MeshShape(replica=2, fsdp=2, tensor=2))

    def summed(x, weights):
        def step(x, weight):
            return jax.lax.with_sharding_constraint(x @ weight, PartitionSpec()), None

        return jax.lax.scan(step, x, weights)[0]

    # The contracted axis is cut over tensor: one all-reduce of 32 x 64 a step.
    program = compiled(summed, mesh, ((32, 64), ()), ((7, 64, 64), (None, "tensor", None)))
    found = [each for each in collectives(program, dict(mesh.shape)) if each.kind == "all-reduce"]
    assert [(each.axes, each.devices, each.count) for each in found] == [(("tensor",), 2, 7)]
    assert found[0].sent == pytest.approx(7 * 32 * 64 * 4 * 2 / 2)


@pytest.mark.parametrize(
    ("attributes", "axes", "devices"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",), 2),
        ("replica_groups=[4,2]<=[8]", ("tensor",), 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("fsdp",), 4),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", ("fsdp",), 4),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}, use_global_device_ids=true", ("fsdp", "tensor"), 8),
        ("source_target_pairs={{0,2},{2,4},{4,6},{6,0}}", ("fsdp",), 4),
        ("replica_groups={}", ("fsdp", "tensor"), 8),
    ],
)
def test_every_way_in_which_groups_are_written(attributes, axes, devices):
    op = "collective-permute" if "pairs" in attributes else "all-reduce"
    instruction = Instruction("x", "f32[4]", op, (), attributes, False)
    assert axes_of(instruction, dict(zip(AXES, (1, 4, 1, 1, 2), strict=True))) == (axes, devices)


# As a TPU's compiler writes it: no count beside the loop, a gather in three fused steps, a cache's memory space.
TPU = """HloModule jit_step, is_scheduled=true

%step_one (a: bf16[8,16]) -> bf16[64,16] {
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[64,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%a), channel_id=5, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="2"}
}

%step_two (b: bf16[8,16]) -> bf16[64,16] {
  %b = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[64,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%b), channel_id=5, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="2"}
}

%condition (p: (s32[], bf16[8,16])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(32)
  %counter = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%body (q: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %q = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%q), index=0
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%q), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%n, %one)
  %f1 = bf16[64,16]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kOutput, calls=%step_one
  %f2 = bf16[64,16]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kOutput, calls=%step_two
  ROOT %out = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%next, %x)
}

ENTRY %main (x: bf16[8,16]) -> bf16[8,16] {
  %x.1 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%zero, %x.1)
  %loop = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
  ROOT %end = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_a_gather_in_steps_of_a_tpus_program_is_counted_once_a_turn():
    program = parse(TPU)
    (found,) = collectives(program, dict(zip(AXES, (1, 8, 1, 1, 1), strict=True)))
    assert (found.kind, found.axes, found.count, found.largest) == ("all-gather", ("fsdp",), 32, 64 * 16 * 2)
    assert program.computations["body"]["f1"].arrays[0].space == 1


def test_groups_along_a_part_of_an_axis():
    text = "replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_0'}"
    sizes = dict(zip(AXES, (1, 4, 1, 1, 2), strict=True))
    assert axes_of(Instruction("x", "f32[4]", "all-gather", (), text, False), sizes) == (("tensor",), 2)
    text = "replica_groups=mesh['axis_0'=8] {'axis_0':(1)4}"
    assert axes_of(Instruction("x", "f32[4]", "all-gather", (), text, False), sizes) == (("fsdp",), 4)


# A layer's part of what all 80 layers kept, sliced out by a fusion within the fusion; and put there.
KEPT = """HloModule jit_step

%slice (k: bf16[80,64,32], n: s32[]) -> bf16[64,32] {
  %k = bf16[80,64,32]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = bf16[1,64,32]{2,1,0} dynamic-slice(%k, %n, %zero, %zero), dynamic_slice_sizes={1,64,32}
  ROOT %flat = bf16[64,32]{1,0} bitcast(%part)
}

%product (x: bf16[16,64], kept: bf16[80,64,32], m: s32[]) -> bf16[16,32] {
  %x = bf16[16,64]{1,0} parameter(0)
  %kept = bf16[80,64,32]{2,1,0} parameter(1)
  %m = s32[] parameter(2)
  %one = bf16[64,32]{1,0} fusion(%kept, %m), kind=kLoop, calls=%slice
  ROOT %dot = bf16[16,32]{1,0} dot(%x, %one), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%put (all: bf16[80,64,32], new: bf16[1,64,32], o: s32[]) -> bf16[80,64,32] {
  %all = bf16[80,64,32]{2,1,0} parameter(0)
  %new = bf16[1,64,32]{2,1,0} parameter(1)
  %o = s32[] parameter(2)
  %nil = s32[] constant(0)
  ROOT %done = bf16[80,64,32]{2,1,0} dynamic-update-slice(%all, %new, %o, %nil, %nil)
}

ENTRY %main (a: bf16[16,64], b: bf16[80,64,32], c: s32[], d: bf16[1,64,32]) -> bf16[80,64,32] {
  %a = bf16[16,64]{1,0} parameter(0)
  %b = bf16[80,64,32]{2,1,0} parameter(1)
  %c = s32[] parameter(2)
  %d = bf16[1,64,32]{2,1,0} parameter(3)
  %used = bf16[16,32]{1,0} fusion(%a, %b, %c), kind=kOutput, calls=%product
  ROOT %stored = bf16[80,64,32]{2,1,0} fusion(%b, %d, %c), kind=kLoop, calls=%put
}
"""


def test_what_a_fusion_slices_is_counted_by_its_slices():
    program = parse(KEPT)
    main = program.computations["main"]
    layer, index = 64 * 32 * 2, 4
    assert moved_bytes(program, main, main["used"]) == 16 * 64 * 2 + layer + index + 16 * 32 * 2
    assert moved_bytes(program, main, main["stored"]) == layer + index + layer


CUBLAS = """HloModule cublas

ENTRY %main (a: f16[4,16,64], b: f16[4,32,64]) -> f32[4,16,32] {
  %a = f16[4,16,64]{2,1,0} parameter(0)
  %b = f16[4,32,64]{2,1,0} parameter(1)
  %product = (f32[4,16,32]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["2"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  ROOT %out = f32[4,16,32]{2,1,0} get-tuple-element(%product), index=0
}
"""


def test_a_product_left_to_cublas_is_one():
    program = parse(CUBLAS)
    main = program.computations["main"]
    assert products(program) == 2 * 4 * 16 * 32 * 64
    assert moved_bytes(program, main, main["product"]) == 2 * 4 * 64 * (16 + 32) + 4 * 4 * 16 * 32
