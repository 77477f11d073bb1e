"""Every kernel of attention against the reference: the result and each gradient, whatever rows hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import random_weights, tiny_config

from cpt_jax.core.errors import UserError
from cpt_jax.core.tree import flatten
from cpt_jax.models.config import LayerKind
from cpt_jax.models.decoder import abstract_decoder, apply
from cpt_jax.models.kernels import attend as attend_module
from cpt_jax.models.kernels import tpu
from cpt_jax.models.kernels.attend import attend
from cpt_jax.models.kernels.blocks import CPU_BLOCK, blocks
from cpt_jax.models.kernels.choice import PREFERRED, Work, choose, refusal
from cpt_jax.models.kernels.gpu import document_table
from cpt_jax.models.kernels.reference import reference
from cpt_jax.models.kernels.visible import Visible, document_begins, document_lengths
from cpt_jax.models.rope import Rope
from cpt_jax.recipe import model as model_module
from cpt_jax.recipe.model import Model
from cpt_jax.sharding.mesh import MeshShape, make_mesh
from cpt_jax.sharding.placement import place
from cpt_jax.sharding.rules import shardings

LENGTH, HEAD = 256, 16
FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
# (heads, key heads, the width of values)
HEADS = {"grouped": (4, 2), "one key head": (3, 1), "each its own": (2, 2)}
HEADS |= {"narrow values": (2, 2, 8), "wide values": (4, 2, 24)}
# Documents that end within and at a block's edge, padding on the left, on the right, and one document.
ROWS = np.stack(
    [np.repeat([1, 2, 3, 4], [11, 117, 100, 28]), np.repeat([0, 1, 0], [130, 60, 66]), np.ones(LENGTH, np.int64)]
)


def inputs(heads: int, groups: int, values: int = HEAD, length: int = LENGTH):
    """(q, k, v, and what the result is multiplied with)."""
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = ((heads, HEAD), (groups, HEAD), (groups, values), (heads, values))
    return [jax.random.normal(key, (3, count, length, width)) for key, (count, width) in zip(keys, sizes, strict=True)]


def result_and_gradients(function, q, k, v, w, visible: Visible, *sinks):
    def summed(q, k, v, *sinks):
        mixed = function(q, k, v, visible, *sinks)
        return (mixed * w).sum(), mixed

    numbers = tuple(range(3 + len(sinks)))
    (_, mixed), gradients = jax.jit(jax.value_and_grad(summed, argnums=numbers, has_aux=True))(q, k, v, *sinks)
    return mixed, *gradients


def splash(window, softcap, dtype, q, k, v, visible, *sinks):
    kernel = tpu.splash_kernel_of(q.shape[1], q.shape[2], window, softcap, interpret=True)
    return tpu.splash(kernel, q, k, v, None if visible.begins is None else (visible.begins,) * 2, dtype, *sinks)


KERNELS = {
    "blocks": lambda window, softcap, dtype: lambda *args: blocks(*args[:4], (window,), softcap, dtype, *args[4:]),
    "splash": lambda window, softcap, dtype: functools.partial(splash, window, softcap, dtype),
}
# (kernel, heads, window, soft cap, packed rows), and whether heads have sinks.
CASES = [
    ("blocks", "grouped", None, None, True),
    ("blocks", "grouped", 200, 2.0, False),
    ("blocks", "one key head", 50, 2.0, True),
    ("blocks", "each its own", None, None, False),
    ("blocks", "narrow values", None, 2.0, True),
    ("blocks", "wide values", 50, None, True),
    ("splash", "narrow values", None, None, True),
    ("splash", "grouped", None, None, False),
    ("splash", "grouped", 50, 2.0, True),
    ("splash", "one key head", 200, None, True),
]
CASES = [(*case, False) for case in CASES] + [
    ("blocks", "grouped", 50, None, True, True),
    ("blocks", "one key head", None, 2.0, False, True),
    ("splash", "grouped", 50, None, True, True),
    ("splash", "each its own", None, None, False, True),
]


@pytest.mark.parametrize(("name", "heads", "window", "softcap", "packed", "sinks"), CASES)
def test_a_kernel_gives_the_reference_and_its_gradients(name, heads, window, softcap, packed, sinks):
    visible = Visible(document_begins(jnp.asarray(ROWS)) if packed else None)
    arrays = [*inputs(*HEADS[heads]), visible]
    if sinks:
        # From what takes next to nothing to what leaves little, by row and head.
        arrays.append(jnp.linspace(-2.0, 6.0, 3 * HEADS[heads][0]).reshape(3, -1))
    as_formula = lambda dtype: lambda *args: reference(*args[:4], (window,), softcap, dtype, *args[4:])  # noqa: E731
    exact = result_and_gradients(as_formula(FLOAT32), *arrays)
    found = result_and_gradients(KERNELS[name](window, softcap, FLOAT32), *arrays)
    for mine, expected in zip(found, exact, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    # In bfloat16 it is not further from float32 than the reference is, which rounds elsewhere.
    rounded = result_and_gradients(as_formula(BFLOAT16), *arrays)
    found = result_and_gradients(KERNELS[name](window, softcap, BFLOAT16), *arrays)
    for mine, usual, expected in zip(found, rounded, exact, strict=True):
        assert mine.dtype == FLOAT32
        assert jnp.linalg.norm(mine - expected) < 1.5 * jnp.linalg.norm(usual - expected)


@pytest.mark.parametrize("meshed", [False, True], ids=["one device", "mesh"])
def test_mapped_over_runs_a_kernel_gives_each_run_what_it_gives_it_alone(meshed):
    """Queries, keys and documents of each run; values that all have in common."""
    q, k, v, w = inputs(4, 2)
    runs = [jax.random.normal(jax.random.key(number), (2, *each.shape)) for number, each in enumerate((q, k))]
    begins = jnp.stack([document_begins(jnp.asarray(rows)) for rows in (ROWS, ROWS[::-1])])
    kinds = Visible(begins, jnp.int32(1), jnp.int32(0))

    def of_run(q, k, v, visible, sinks, runs):
        options = dict(windows=(None, 50), softcap=2.0, dtype=FLOAT32, kernel="blocks", runs=runs)
        call = lambda q, k, v, visible, sinks: attend(q, k, v, visible, sinks=sinks, **options)  # noqa: E731
        return result_and_gradients(call, q, k, v, w, visible, sinks)

    sinks = jnp.linspace(-2.0, 3.0, 8).reshape(2, 4)
    each = zip(*runs, begins, sinks, strict=True)
    alone = [of_run(q, k, v, kinds._replace(begins=own), sinks, False) for q, k, own, sinks in each]
    with jax.set_mesh(make_mesh(shape=MeshShape(tensor=2)) if meshed else make_mesh(jax.devices()[:1])):
        mapped = jax.vmap(functools.partial(of_run, runs=True), in_axes=(0, 0, None, Visible(0, None, None), 0))
        text = str(jax.make_jaxpr(mapped)(*runs, v, kinds, sinks))
        together = mapped(*runs, v, kinds, sinks)
    # One call with the rows of both, of which each device has its heads.
    groups = 1 if meshed else 2
    assert f"f32[6,{groups},2,256,16]" in text
    assert f"f32[2,3,{groups},2,256,16]" not in text
    for number, expected in enumerate(alone):
        for mine, theirs in zip(together, expected, strict=True):
            np.testing.assert_allclose(mine[number], theirs, atol=1e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("length", [40, CPU_BLOCK + 1])
def test_blocks_take_rows_that_they_do_not_divide(length):
    arrays, visible = inputs(4, 2, length=length), Visible(document_begins(jnp.asarray(ROWS[:, :length])))
    expected = result_and_gradients(lambda *args: reference(*args, (None,), None, FLOAT32), *arrays, visible)
    found = result_and_gradients(lambda *args: blocks(*args, (None,), None, FLOAT32), *arrays, visible)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))


def test_blocks_bear_scores_far_below_zero():
    """All of -480: of exponentials that began at 0, nothing would be left."""
    _, _, v, _ = inputs(4, 2, length=40)
    q, k = jnp.ones((3, 4, 40, HEAD)), jnp.full((3, 2, 40, HEAD), -30.0)
    expected = reference(q, k, v, Visible(None), (None,), None, FLOAT32)
    np.testing.assert_allclose(blocks(q, k, v, Visible(None), (None,), None, FLOAT32), expected, atol=1e-5)


def test_blocks_need_no_scores_of_a_whole_row():
    q, k, v, _ = inputs(4, 2, length=2048)

    def temporaries(kernel: str) -> int:
        call = functools.partial(attend, windows=(None,), softcap=None, dtype=BFLOAT16, kernel=kernel)
        summed = jax.grad(lambda q, k, v: call(q, k, v, Visible(None)).sum(), argnums=(0, 1, 2))
        return jax.jit(summed).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    one_head = 3 * 2048 * 2048 * 4
    assert temporaries("blocks") < one_head < temporaries("xla")


@pytest.mark.parametrize("kernel", ["xla", "blocks"])
def test_a_policy_that_keeps_the_result_by_name_saves_its_computation(kernel):
    """Blocks: their loops run in the forward pass, and once in the backward pass, not twice."""
    q, k, v, _ = inputs(4, 2)
    call = functools.partial(attend, windows=(None,), softcap=None, dtype=FLOAT32, kernel=kernel)

    def program(policy) -> str:
        layer = jax.checkpoint(lambda q, k, v: jnp.sin(call(q, k, v, Visible(None))).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(layer, argnums=(0, 1, 2)))(q, k, v))

    kept = program(jax.checkpoint_policies.save_only_these_names("attention_out"))
    loops = {"xla": (0, 0), "blocks": (2, 3)}[kernel]
    assert (kept.count("scan["), program(None).count("scan[")) == loops
    assert "name=attention_out" in kept


def test_documents_begin_and_end_where_their_ids_change():
    begins = document_begins(jnp.array([[0, 0, 3, 3, 3, 1, 0, 0]]))
    np.testing.assert_array_equal(begins, [[0, 0, 2, 2, 2, 5, 6, 6]])
    lengths = document_lengths(begins, jnp.array([[0, 0, 0, 1, 2, 0, 0, 0]]))
    np.testing.assert_array_equal(lengths, [[1, 1, 3, 3, 3, 1, 1, 1]])


def test_the_table_of_documents_gives_each_its_length_and_first_place():
    begins = document_begins(jnp.array([[1, 1, 2, 3, 3, 3], [0, 0, 0, 0, 0, 0]]))
    lengths, first = document_table(begins == jnp.arange(6)[None], 4)
    np.testing.assert_array_equal(lengths, [[2, 1, 3, -1], [6, -1, -1, -1]])
    np.testing.assert_array_equal(first, [[0, 2, 3, -1, -1], [0, -1, -1, -1, -1]])
    # As many as there is room for.
    lengths, first = document_table(begins == jnp.arange(6)[None], 3)
    np.testing.assert_array_equal(lengths, [[2, 1, 3], [6, -1, -1]])
    np.testing.assert_array_equal(first, [[0, 2, 3, -1], [0, -1, -1, -1]])


def windowed(**changes):
    """A model of two kinds of layers, with what some kernels do not have."""
    rope = Rope(theta=10_000.0, dim=8)
    kinds = (LayerKind(rope=rope), LayerKind(rope=rope, window=50), LayerKind(rope=rope, window=5000))
    sizes = dict(num_layers=3, layer_kinds=kinds, layer_pattern=(1, 2, 0), attention_softcap=3.0)
    sizes["attention_sinks"] = True
    return tiny_config(**(sizes | changes))


@pytest.mark.parametrize(
    ("kernel", "sizes"),
    [
        ("blocks", dict(fsdp=2, tensor=2, replica=2)),
        ("blocks", dict(fsdp=1, replica=2, tensor=4)),
        ("splash", dict(fsdp=2, expert=2, tensor=2)),
        # Of each row, a device has a part.
        ("xla", dict(fsdp=2, context=4)),
        ("blocks", dict(fsdp=2, context=2, tensor=2)),
        ("splash", dict(replica=2, context=2, tensor=2)),
    ],
    ids=str,
)
def test_on_a_mesh_a_model_with_a_kernel_is_the_model_with_the_reference(kernel, sizes, monkeypatch):
    """Layers of several kinds under one scan; 2 key heads on 4 devices stay whole."""
    splash = kernel == "splash"
    if splash:
        monkeypatch.setattr(attend_module.jax, "default_backend", lambda: "tpu")
        monkeypatch.setattr(tpu, "splash_kernel_of", functools.partial(tpu.splash_kernel_of, interpret=True))
    segments = jnp.asarray(np.concatenate([ROWS, ROWS[::-1], ROWS[:2]]))
    tokens = jax.random.randint(jax.random.key(0), segments.shape, 3, 320)
    positions = jnp.arange(LENGTH)[None] - document_begins(segments)
    weights = random_weights(windowed())
    mesh = make_mesh(shape=MeshShape(**sizes))

    def summed(network, weights):
        dtype = "bfloat16" if splash else "float32"
        hidden = apply(network, weights, tokens, positions, segments, compute_dtype=dtype)
        return (hidden**2 * jnp.cos(jnp.arange(32.0))[None, None]).sum()

    expected = jax.jit(jax.value_and_grad(functools.partial(summed, abstract_decoder(windowed(attention="xla")))))(
        jax.tree.map(jnp.asarray, weights)
    )
    network = abstract_decoder(windowed(attention=kernel))
    where = shardings(network.logical_axes, network.shapes, mesh)
    placed = jax.tree.map(lambda leaf, sharding: place(leaf, leaf.dtype, sharding), weights, where)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(functools.partial(summed, network)))(placed)
    # A TPU's products are written in bfloat16.
    tolerance = 5e-2 if splash else 1e-4
    np.testing.assert_allclose(found[0], expected[0], rtol=tolerance)
    for path, leaf in flatten(found[1]).items():
        # Single numbers of bfloat16 gradients may be a tenth apart, all together are not.
        right = np.asarray(flatten(expected[1])[path])
        assert np.linalg.norm(np.asarray(leaf) - right) <= tolerance * np.linalg.norm(right), path


def work(**changes) -> Work:
    usual = dict(backend="gpu", length=1024, head_dim=64, windows=(None,), softcap=None, dtype=BFLOAT16)
    usual["capability"] = 9.0 if changes.get("backend", "gpu") == "gpu" else None
    return Work(**(usual | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(backend="cpu"), "blocks"),
        (dict(backend="cpu", length=128), "xla"),
        (dict(backend="cpu", dtype=jnp.dtype("float64")), "xla"),
        (dict(), "cudnn"),
        (dict(windows=(None, 512)), "cudnn"),
        (dict(length=1000), "cudnn"),
        (dict(length=1001), "xla"),
        (dict(head_dim=256), "xla"),
        (dict(head_dim=68), "xla"),
        (dict(context=2), "xla"),
        (dict(softcap=50.0), "xla"),
        (dict(sinks=True), "xla"),
        (dict(sinks=True, length=2048), "blocks"),
        (dict(backend="tpu", sinks=True), "splash"),
        (dict(softcap=50.0, length=2048), "blocks"),
        (dict(dtype=FLOAT32), "xla"),
        # A T4, an A100, a GPU of AMD's.
        (dict(capability=7.5), "xla"),
        (dict(capability=7.5, length=8192), "blocks"),
        (dict(capability=8.0), "cudnn"),
        (dict(capability=None), "xla"),
        (dict(backend="tpu", softcap=50.0, windows=(512, None)), "splash"),
        (dict(backend="tpu", length=1000), "xla"),
        # Each device's part of a row is to be whole blocks.
        (dict(backend="tpu", length=1280, context=2), "splash"),
        (dict(backend="tpu", length=1152, context=2), "xla"),
        (dict(backend="cpu", length=1280, context=2), "blocks"),
        (dict(backend="cpu", length=1152, context=2), "xla"),
        (dict(backend="another"), "xla"),
    ],
    ids=str,
)
def test_the_kernel_taken_unasked_can_do_the_work(changes, expected):
    assert choose(work(**changes)) == expected
    assert refusal(expected, work(**changes)) is None


def test_a_run_takes_its_kernel_once():
    config = tiny_config()
    model = Model(config=config, weights=random_weights(config), hf_config={})
    assert model.attending("auto", 1024, BFLOAT16).config.attention == "blocks"
    assert model.attending("xla", 1024, BFLOAT16).config.attention == "xla"
    with pytest.raises(UserError, match="attention 'splash' needs a TPU, this is a cpu"):
        model.attending("splash", 1024, BFLOAT16)


def test_what_reads_a_stage_s_weights_chooses_for_its_own_rows():
    """Blocks take these rows in two parts, and not those of 640 tokens, on which forgetting may be watched."""
    config = tiny_config()
    model = Model(config=config, weights=random_weights(config), hf_config={}).attending("auto", 1024, FLOAT32, None, 2)
    assert model.config.attention == "blocks"
    tokens = jnp.zeros((4, 640), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(640)[None], tokens.shape)
    with jax.set_mesh(make_mesh(shape=MeshShape(context=2))):
        jax.eval_shape(
            lambda weights: apply(model.looped().network, weights, tokens, positions, None, compute_dtype="float32"),
            model.network.shapes,
        )


def test_a_run_of_a_model_with_sinks_takes_no_kernel_without(monkeypatch):
    monkeypatch.setattr(model_module.hardware, "backend", lambda: "gpu")
    monkeypatch.setattr(model_module.hardware, "compute_capability", lambda: 9.0)
    for sinks, kernel in ((False, "cudnn"), (True, "xla")):
        config = tiny_config(attention_sinks=sinks)
        model = Model(config=config, weights={}, hf_config={})
        assert model.attending("auto", 1024, BFLOAT16).config.attention == kernel


def test_a_kernel_that_cannot_do_it_is_refused_in_one_line():
    q, k, v, _ = inputs(4, 2)
    for kernel in {kernel for kernels in PREFERRED.values() for kernel in kernels} - {"blocks"}:
        with pytest.raises(UserError, match=f"attention '{kernel}' needs an? .*, this is a cpu: give 'auto'"):
            attend(q, k, v, Visible(None), windows=(None,), softcap=None, dtype=BFLOAT16, kernel=kernel)
    for capability in (8.9, 12.0):
        assert "Hopper or" in (refusal("tokamax", work(capability=capability)) or "")
    expected = "needs an NVIDIA GPU of the Ampere or a later generation, this is a GPU of compute capability 7.5"
    assert refusal("cudnn", work(capability=7.5)) == expected
    assert refusal("cudnn", work(capability=None)) == expected.replace("GPU of compute capability 7.5", "gpu")
    assert refusal("tokamax", work(softcap=50.0)) == 'needs tokamax: pip install "tokamax>=0.0.17"'
    assert refusal("cudnn", work(softcap=50.0)) == "has no soft cap, the model's is 50.0"
    assert refusal("cudnn", work(sinks=True)) == "has no attention sinks, the model does"
    assert refusal("splash", work(backend="tpu", length=1000)) == "wants rows of a multiple of 128 tokens, not 1000"
