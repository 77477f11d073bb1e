"""Memory on paper against what the program keeps."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import pytest
from inputs import tiny_config
from jax.interpreters.partial_eval import dce_jaxpr
from models.test_hybrid import KINDS as HYBRID_KINDS
from training_inputs import training

from cpt_jax.adapt import ByPath, Embeddings, Full, LoRA, Method
from cpt_jax.checkpoint.train_state import Checkpoints
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.tree import combine, flatten, partition
from cpt_jax.models.attention import GlobalAttention
from cpt_jax.models.config import LayerKind
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.models.experts import ClampedSwiGLU, ExpertsConfig
from cpt_jax.models.latent_attention import LatentAttentionConfig
from cpt_jax.models.lone_feed_forward import LoneExpertsConfig, LoneFeedForwardConfig
from cpt_jax.models.remat import Remat
from cpt_jax.models.rope import Rope
from cpt_jax.models.side_by_side import SideBySideConfig
from cpt_jax.optim.averaging import EMA
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.training.loop import train
from cpt_jax.training.loss import make_loss
from cpt_jax.training.memory import StageMemory, stage_memory
from cpt_jax.training.retention import Anchor, L2ToStart, start_of
from cpt_jax.training.training import Training, place_weights

ROWS, LENGTH = 2, 256
EXPERTS = ExpertsConfig(count=8, per_token=2, renormalise=True, balance_coefficient=0.0)
SHARED = dataclasses.replace(EXPERTS, shared_intermediate_size=320)
BIASED = dataclasses.replace(EXPERTS, bias=True, swiglu=ClampedSwiGLU(alpha=1.702, limit=7.0))
# q, k, v, o, gate, up, down.
ADAPTED = 7
SIZES = dict(hidden_size=96, intermediate_size=256, num_layers=6, num_heads=6, num_kv_heads=2, head_dim=16)

# Two periods.
HYBRID = dict(layer_kinds=HYBRID_KINDS, layer_pattern=(0, 1, 2, 3, 4) * 2, num_layers=10, attention_gate="head")


def kept_by_layers(config, method, compute) -> int:
    """Bytes that the layers' loops hand on to their backward passes."""
    network = abstract_decoder(config, method.lora_config())
    trainable, frozen = partition(network.shapes, method.trains)
    rows = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    names = ("inputs", "targets", "positions", "segment_ids", "domains")
    batch = dict.fromkeys(names, rows) | {"weights": jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32)}
    loss = make_loss(network, compute, method.trains, ("text",))

    def objective(trainable, frozen, batch):
        return loss(combine(trainable, frozen), batch)[0]

    traced = jax.make_jaxpr(jax.grad(objective))(trainable, frozen, batch).jaxpr
    program = dce_jaxpr(traced, [True] * len(traced.outvars))[0]
    kept, loops = 0, [each for each in program.eqns if each.primitive.name == "scan"]
    for loop in loops:
        periods = config.num_layers // max(1, len(config.layer_kinds))
        groups = dict(config.layer_groups).values() or map(len, config.sections.values())
        of_layers = loop.params["length"] in (config.num_layers, periods, *groups)
        if of_layers and not loop.params["reverse"]:
            # What is carried on has the shape that it has in the loop; what is stacked has an axis more.
            inner = loop.params["jaxpr"].out_avals
            avals = [each.aval for each, one in zip(loop.outvars, inner, strict=True) if each.aval.ndim > one.ndim]
            kept += sum(aval.size * aval.dtype.itemsize for aval in avals)
    return kept


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["xla", "blocks"])
@pytest.mark.parametrize(
    "method",
    [Full(), LoRA(rank=4, alpha=8), Embeddings(rows="all"), ByPath(patterns=("layers/*",), layers=(4, 6))],
    ids=["full", "lora", "rows", "the last layers"],
)
def test_layers_keep_what_is_on_paper(method, attention, compute):
    config = method.layout(tiny_config(**SIZES, attention=attention))
    paper = stage_memory(
        abstract_decoder(config, method.lora_config()),
        method.trains,
        AdamW(learning_rate=1.0),
        precision=Precision(compute=compute),
        rows=ROWS,
        sequence_length=LENGTH,
        scores=attention == "xla",
    )
    assert paper.activations == pytest.approx(kept_by_layers(config, method, compute), rel=0.2)


GLOBAL = LayerKind(rope=Rope(theta=1e4, dim=32), mixer=GlobalAttention(head_dim=32, num_kv_heads=2))
VALUES_ARE_KEYS = LayerKind(rope=GLOBAL.rope, mixer=GlobalAttention(head_dim=32, num_kv_heads=2, values_are_keys=True))
SIDE_BY_SIDE = LayerKind(rope=Rope(theta=1e4, dim=16), mixer=SideBySideConfig(mamba2=HYBRID_KINDS[3].mixer))
LATENT = dict(rank=48, fixed_dim=16, rotated_dim=8, value_dim=20)
LATENT_QUERIES = LayerKind(rope=Rope(theta=1e4, dim=8), mixer=LatentAttentionConfig(query_rank=64, **LATENT))
LATENT_KEYS = LayerKind(rope=Rope(theta=1e4, dim=8), mixer=LatentAttentionConfig(query_rank=None, **LATENT))
ALONE = LayerKind(rope=None, mixer=LoneFeedForwardConfig())
ONE_OR_THE_OTHER = dict(layer_kinds=(*HYBRID_KINDS[:2], ALONE), layer_pattern=(0, 1, 2) * 2)
NORMED = dict(qk_norm="head", value_norm=True, layer_scalar=True)
SHARING = NORMED | dict(layer_kinds=(GLOBAL,), sharing_layers=4, sharing_intermediate_size=512, layer_input_size=16)
SHARING |= dict(norm_placement="both")
BESIDE = dict(experts=dataclasses.replace(EXPERTS, intermediate_size=128, beside=True), norm_placement="both")
DENSE_FIRST = dict(experts=dataclasses.replace(SHARED, intermediate_size=128, shared_gate=False), dense_layers=2)
LONE_EXPERTS = dict(layer_kinds=(HYBRID_KINDS[1], LayerKind(rope=None, mixer=LoneExpertsConfig())), gated=False)
LONE_EXPERTS |= dict(layer_pattern=(0, 1) * 3, feed_forward=False, activation="relu2", experts=DENSE_FIRST["experts"])
KINDS = {
    "experts alone, without gates": (LONE_EXPERTS, Full()),
    "experts alone, in a smaller space": (
        LONE_EXPERTS | dict(experts=dataclasses.replace(LONE_EXPERTS["experts"], latent_size=16)),
        Full(),
    ),
    "experts alone, with adapters": (LONE_EXPERTS, LoRA(rank=4, alpha=8)),
    "norms of heads once they are rotated": (dict(qk_norm="rotated"), Full()),
    "norms of heads and behind": (dict(qk_norm="head", norm_placement="both"), Full()),
    "attention and Mamba 2 side by side": (dict(layer_kinds=(SIDE_BY_SIDE,)), LoRA(rank=4, alpha=8)),
    "mixers and feed-forwards apart": (ONE_OR_THE_OTHER | dict(feed_forward=False, gated=False), Full()),
    "heads of their own": (NORMED | dict(layer_kinds=(GLOBAL,)), Full()),
    "heads of their own, values are keys": (NORMED | dict(layer_kinds=(VALUES_ARE_KEYS,)), Full()),
    "latents": (dict(layer_kinds=(LATENT_QUERIES,)), Full()),
    "latents with adapters": (dict(layer_kinds=(LATENT_QUERIES,)), LoRA(rank=4, alpha=8)),
    "latents of keys and values alone": (dict(layer_kinds=(LATENT_KEYS,)), LoRA(rank=4, alpha=8)),
    "parallel, without a gate": (dict(parallel_residual=True, gated=False), Full()),
    "an activation that learns": (dict(gated=False, activation="xielu"), Full()),
    "experts": (dict(experts=EXPERTS), Full()),
    "experts with adapters": (dict(experts=EXPERTS), LoRA(rank=4, alpha=8)),
    "every mixer": (HYBRID, Full()),
    "every mixer, with adapters": (HYBRID, LoRA(rank=4, alpha=8)),
    "experts with biases, cut off": (dict(experts=BIASED, attention_sinks=True), Full()),
    "experts with biases, cut off, and adapters": (dict(experts=BIASED), LoRA(rank=4, alpha=8)),
    "a shared expert": (dict(experts=SHARED), Full()),
    "a shared expert without a gate": (dict(experts=dataclasses.replace(SHARED, shared_gate=False)), Full()),
    "experts beside a feed-forward": (BESIDE, Full()),
    # Two layers with keys and values of their own, four without.
    "shared keys, inputs of layers": (SHARING, Full()),
    "shared keys, inputs of layers, with adapters": (SHARING, LoRA(rank=4, alpha=8)),
    "the first two dense": (DENSE_FIRST, Full()),
    "the first two dense, with adapters": (DENSE_FIRST, LoRA(rank=4, alpha=8)),
    "a shared expert with adapters": (dict(experts=SHARED), LoRA(rank=4, alpha=8)),
}


@pytest.mark.parametrize(("changes", "method"), KINDS.values(), ids=KINDS)
def test_layers_of_every_kind_keep_what_is_on_paper(changes, method):
    config = method.layout(tiny_config(**SIZES | changes, attention="blocks"))
    expected = kept_by_layers(config, method, "bfloat16")
    assert paper_of(config, method).activations == pytest.approx(expected, rel=0.05)


def paper_of(config, method, **changes) -> StageMemory:
    return stage_memory(
        abstract_decoder(config, method.lora_config()),
        method.trains,
        AdamW(learning_rate=1.0),
        **dict(precision=Precision(compute="bfloat16"), rows=ROWS, sequence_length=LENGTH) | changes,
    )


@pytest.mark.parametrize("experts", [EXPERTS, SHARED], ids=["routed", "shared"])
def test_products_of_experts_are_not_kept_but_the_shared_ones(experts):
    config = tiny_config(**SIZES, experts=experts, attention="blocks")
    products = dataclasses.replace(config, remat=Remat(products=True))
    kept = paper_of(products, Full()).activations - paper_of(config, Full()).activations / SIZES["num_layers"]
    assert kept == pytest.approx(kept_by_layers(products, Full(), "bfloat16"), rel=0.05)


def test_what_is_named_is_kept_at_its_width_and_products_with_those_of_adapters():
    def activations(remat, method: Method, **changes) -> float:
        config = tiny_config(**SIZES, attention="blocks", remat=remat)
        return paper_of(config, method, **changes).activations

    tokens = ROWS * LENGTH * SIZES["num_layers"]
    widths = dict(queries=96, keys=32, values=32, attention_out=96, mlp_gate=256, mlp_up=256)
    for name, width in widths.items():
        more = activations(Remat(keep=(name,)), Full()) - activations(Remat(), Full())
        assert more == 2 * tokens * width, name
    low, high = (activations(Remat(products=True), LoRA(rank=rank, alpha=8)) for rank in (4, 64))
    # Kept in float32, and of the layer whose gradient is computed rounded as well.
    assert high - low == ROWS * LENGTH * ADAPTED * 60 * (4 * SIZES["num_layers"] + 6)
    # Of layers that are cut over devices the residual stream is whole.
    stream = 4 * tokens * SIZES["hidden_size"]
    whole, cut = (activations(None, Full(), tensor=parts) for parts in (1, 4))
    assert cut - 2 * stream == (whole - 2 * stream) / 4
    whole, cut = (activations(Remat(products=True), Full(), tensor=parts) for parts in (1, 4))
    of_one_layer = 2 * stream / SIZES["num_layers"]
    assert cut - stream - of_one_layer == (whole - stream - of_one_layer) / 4


def test_logits_are_those_of_a_chunk_and_what_is_greater_counts_within_a_step():
    config = tiny_config(vocab_size=300, new_rows=20, row_multiple=8)
    # 304 and 24 rows; logits, exponentials and the rounded gradient.
    assert paper_of(config, Full(), rows=1, sequence_length=100).logits == 100 * (8 + 2) * 328
    assert paper_of(config, Full(), rows=4, sequence_length=256).logits == 512 * (8 + 2) * 328
    paper = StageMemory(weights=1, optimizer=2, average=3, start=4, gradients=50, activations=6, logits=70)
    assert (paper.held, paper.temporary, paper._replace(gradients=80).temporary) == (10, 76, 86)


@pytest.mark.parametrize(
    "remat",
    [Remat(), Remat(products=True), Remat(keep=("mlp_up", "attention_out"))],
    ids=["whole", "products", "by name"],
)
@pytest.mark.parametrize("method", [Full(), LoRA(rank=4, alpha=8)], ids=["full", "lora"])
def test_with_rematerialisation_layers_keep_what_is_on_paper_too(method, remat):
    def paper(remat) -> int:
        config = method.layout(tiny_config(**SIZES, attention="blocks", remat=remat))
        return stage_memory(
            abstract_decoder(config, method.lora_config()),
            method.trains,
            AdamW(learning_rate=1.0),
            precision=Precision(compute="bfloat16"),
            rows=ROWS,
            sequence_length=LENGTH,
        ).activations

    config = method.layout(tiny_config(**SIZES, attention="blocks", remat=remat))
    # And one layer's whole, while its gradient is computed.
    a_layer = paper(None) / SIZES["num_layers"]
    assert paper(remat) - a_layer == pytest.approx(kept_by_layers(config, method, "bfloat16"), rel=0.2)


def test_where_products_are_kept_adapters_own_are_computed_again():
    """But for A's, whatever the rank: 64 is more than most of these layers' outputs are wide."""

    def kept(method) -> int:
        config = method.layout(tiny_config(**SIZES, attention="blocks", remat=Remat(products=True)))
        return kept_by_layers(config, method, "bfloat16")

    low, high = (kept(LoRA(rank=rank, alpha=8, new_rows=False)) for rank in (4, 64))
    assert low <= 1.1 * kept(Full())
    assert high - low == 4 * ROWS * LENGTH * SIZES["num_layers"] * ADAPTED * (64 - 4)


def test_a_stage_that_does_not_fit_says_what_it_takes_and_what_takes_less(directories, tmp_path, monkeypatch):
    run = training(directories, tmp_path, Full())
    program, says = (
        run.program(),
        ["RESOURCE_EXHAUSTED: Out of memory while trying to allocate 28.47GiB.", "INTERNAL: x"],
    )

    def step(*_):
        raise jax.errors.JaxRuntimeError(says[0])

    monkeypatch.setattr(Training, "program", lambda self: dataclasses.replace(program, step=step))
    paper = run.memory()
    text = (
        rf"stage: .* is full \(28.47GiB more .*holds {paper.held / 1e9:.1f} GB and takes {paper.temporary / 1e9:.1f} GB"
    )
    with pytest.raises(UserError, match=text + ".*batch_size"):
        train(run)
    # Whatever else a device says is no matter of memory.
    del says[0]
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        train(run)


def test_a_run_that_goes_on_has_its_state_once(directories, tmp_path, monkeypatch):
    """Not one that is begun beside the one that is restored: what fits when it begins fits when it goes on."""
    run, restore, held = training(directories, tmp_path, Full(), checkpoint_seconds=0), Checkpoints.restore, []

    def looked_at(self, like):
        gc.collect()
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        return restore(self, like)

    monkeypatch.setattr(Checkpoints, "restore", looked_at)
    weights = sum(4 * leaf.size for leaf in flatten(run.weights).values())
    for _ in range(2):
        gc.collect()
        before = sum(array.nbytes for array in jax.live_arrays())
        train(training(directories, tmp_path, Full()))
        assert held.pop() - before < 1.1 * weights


@pytest.mark.parametrize("ema", [EMA(), EMA(on_host=True)], ids=["on the devices", "on the host"])
@pytest.mark.parametrize("method", [Full(), LoRA(rank=4, alpha=8)], ids=["full", "lora"])
def test_what_retention_keeps_is_on_paper(directories, tmp_path, method, ema):
    run = training(directories, tmp_path, method, ema=ema, retention=(Anchor(), L2ToStart(weight=0.1)))
    program = run.program()
    trainable, frozen = place_weights(run.weights, run.trains, run.precision, program.where)
    state = program.begin(trainable)
    held = state._replace(average=None) if ema.on_host else state
    arrays = jax.tree.leaves((held, frozen, start_of(trainable, run.retention)))
    assert run.memory().held == pytest.approx(sum(array.nbytes for array in arrays), abs=64)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_kernels_of_few_bits_are_on_paper(directories, tmp_path, kind):
    few_bits = Precision(compute="bfloat16", frozen_kernels=kind)
    run = training(directories, tmp_path, LoRA(rank=4, alpha=8), precision=few_bits)
    held = place_weights(run.weights, run.trains, run.precision, run.program().where)
    bits = [leaf.size * (4 if leaf.dtype == jnp.uint4 else 8 * leaf.dtype.itemsize) for leaf in jax.tree.leaves(held)]
    assert run.memory().weights == sum(bits) // 8


def test_what_is_held_between_steps():
    config, method = tiny_config(**SIZES, new_rows=8), LoRA(rank=4, alpha=8)
    network = abstract_decoder(config, method.lora_config())
    trained = sum(leaf.size for path, leaf in flatten(network.shapes).items() if method.trains(path))
    norms = sum(leaf.size for path, leaf in flatten(network.shapes).items() if path.endswith("/scale"))
    total = sum(leaf.size for leaf in flatten(network.shapes).values())
    paper = stage_memory(
        network, method.trains, AdamW(learning_rate=1.0), ema=EMA(), precision=Precision(compute="bfloat16")
    )
    assert paper.weights == 4 * trained + 4 * norms + 2 * (total - trained - norms)
    assert paper.average == paper.gradients == 4 * trained
    assert paper.optimizer == pytest.approx(8 * trained, abs=64)
    assert paper.held == paper.weights + paper.optimizer + paper.average
    assert paper.temporary == paper.gradients
