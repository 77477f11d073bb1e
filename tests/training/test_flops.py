"""Model FLOPs against the matrix products of the program itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import tiny_config
from jax.extend import core as jaxprs
from jax.interpreters.partial_eval import dce_jaxpr
from models.test_hybrid import KINDS as HYBRID_KINDS

from cpt_jax.adapt import ByPath, Embeddings, Full, LoRA
from cpt_jax.core.tree import combine, partition
from cpt_jax.models.config import LayerKind
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.models.experts import ExpertsConfig
from cpt_jax.models.side_by_side import SideBySideConfig
from cpt_jax.sharding.hardware import peak_flops
from cpt_jax.training.flops import mixing_flops, token_flops
from cpt_jax.training.loss import make_loss
from cpt_jax.training.retention import Anchor, Held, MeanTeacher, start_of

ROWS, LENGTH = 2, 96
SIZES = dict(hidden_size=64, intermediate_size=96, num_layers=3, new_rows=10)


def products(jaxpr) -> float:
    """FLOPs of all matrix products of a program, loops multiplied out."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            sizes = [equation.invars[0].aval.shape[axis] for axis in contracted]
            total += 2.0 * np.prod(equation.outvars[0].aval.shape) * np.prod(sizes)
        inner = sum(products(part) for part in jaxprs.jaxprs_in_params(equation.params))
        total += inner * equation.params.get("length", 1)
    return total


def program_flops(config, method, retention=()) -> float:
    """Of a step's loss and gradient of what trains, what nothing depends on left out."""
    network = abstract_decoder(config, method.lora_config())
    trainable, frozen = partition(network.shapes, method.trains)
    rows = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    names = ("inputs", "targets", "positions", "segment_ids", "domains")
    batch = dict.fromkeys(names, rows) | {"weights": jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32)}
    loss = make_loss(network, "float32", method.trains, ("text",), retention=retention)
    start = jax.eval_shape(lambda weights: start_of(weights, retention), trainable)

    def objective(trainable, frozen, batch, average, start):
        return loss(combine(trainable, frozen), batch, None, Held(np.float32(1), average, start))[0]

    traced = jax.make_jaxpr(jax.value_and_grad(objective))(trainable, frozen, batch, trainable, start).jaxpr
    return products(dce_jaxpr(traced, [True] * len(traced.outvars))[0])


@pytest.mark.parametrize(
    ("method", "backward"),
    [
        (Full(), 3),
        (LoRA(rank=4, alpha=8), 3),
        (LoRA(rank=4, alpha=8, targets=("q", "down"), new_rows=False), 3),
        (Embeddings(rows="new"), 3),
        (Embeddings(rows="all", tables="output"), 0),
        (ByPath(patterns=("layers/mlp/*",), layers=(1, 2)), 2),
        (ByPath(patterns=("final_norm/scale",)), 0),
    ],
    ids=["full", "lora and rows", "lora of some", "new rows", "head", "a layer", "the last norm"],
)
def test_the_program_does_what_is_counted_and_the_other_half_of_attention(method, backward):
    untied = isinstance(method, Embeddings) and method.tables == "output"
    config = method.layout(tiny_config(**SIZES, tie_word_embeddings=not untied))
    counted = token_flops(abstract_decoder(config, method.lora_config()), method.trains, LENGTH).total
    unseen = 4 * config.num_heads * config.head_dim * (LENGTH - (LENGTH + 1) / 2) * (config.num_layers + 2 * backward)
    assert program_flops(config, method) == pytest.approx((counted + unseen) * ROWS * LENGTH, rel=0.01)


@pytest.mark.parametrize(("part", "teacher"), [(Anchor(), "start"), (MeanTeacher(), "average")])
def test_a_teacher_is_counted_with_its_own_vocabulary(part, teacher):
    method, config = LoRA(rank=4, alpha=8), tiny_config(**SIZES | {"new_rows": 500})
    counted = token_flops(abstract_decoder(config, method.lora_config()), method.trains, LENGTH, teacher=teacher).total
    unseen = 4 * config.num_heads * config.head_dim * (LENGTH - (LENGTH + 1) / 2) * 4 * config.num_layers
    assert program_flops(config, method, (part,)) == pytest.approx((counted + unseen) * ROWS * LENGTH, rel=0.01)


def test_parts_of_a_known_model():
    """SmolLM2-135M: 106.2M parameters in linears, a tied table of 49,152 x 576, 9 heads of 64 in 30 layers."""
    config = tiny_config(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64
    )  # fmt: skip
    linears = 30 * (576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536)
    attention = 30 * 4 * 576 * (256 + 1) / 2
    forward = 2 * (linears + 49152 * 576) + attention
    full = token_flops(abstract_decoder(config), Full().trains, 256)
    assert full.forward == pytest.approx(forward)
    assert full.total == pytest.approx(3 * forward)
    taught = token_flops(abstract_decoder(config), Full().trains, 256, teacher="average")
    assert taught.total == pytest.approx(4 * forward)
    lora = LoRA(rank=16, alpha=32)
    adapted = abstract_decoder(config, lora.lora_config())
    factors = 16 * 30 * (3 * 576 + 576 + 2 * 192 + 576 + 576 + 3 * (576 + 1536))
    counted = token_flops(adapted, lora.trains, 256, teacher="start")
    # Frozen kernels have no gradient of their own; attention has none that could be saved.
    assert counted.total == pytest.approx(2 * forward + attention + 6 * factors + forward)


def test_layers_that_mix_tokens_in_other_ways():
    """One of each: linear attention, attention with gates, a convolution, Mamba 2, latent attention."""
    kinds = dict(num_layers=5, layer_kinds=HYBRID_KINDS, layer_pattern=(0, 1, 2, 3, 4))
    config = tiny_config(**SIZES | dict(new_rows=0) | kinds)
    config = dataclasses.replace(config, attention_gate="channel")
    width, feed_forward, head = 64, 3 * 64 * 96, 64 * 320
    # 2 key heads of 8, 4 value heads of 16; q, k, v, the gate, beta and decay, o; the state is read twice and written.
    linear = width * (16 + 16 + 64 + 64 + 4 + 4) + 64 * width
    attention = width * (32 + 16 + 16 + 32) + 32 * width
    convolution = 4 * width * width
    # 4 heads of 16, 2 groups with states of 8; the gate, v, k, q and the steps, o; the state is read and written.
    mamba = width * (64 + 64 + 16 + 16 + 4) + 64 * width
    # Latents of 12 and of 10 and 6; 4 heads of 10, and of 8 for values.
    latent = width * 12 + 12 * 40 + width * 16 + 10 * 4 * (4 + 8) + 32 * width
    products = 2.0 * (linear + attention + convolution + mamba + latent + 5 * feed_forward + head)
    mixing = (6 + 4) * 4 * 8 * 16 + (4 * 32 + 2 * 4 * (10 + 8)) * (LENGTH + 1) / 2
    counted = token_flops(abstract_decoder(config), Full().trains, LENGTH)
    assert counted.forward == pytest.approx(products + mixing)
    assert counted.activations == pytest.approx(products + 2 * mixing)
    assert counted.weights == pytest.approx(products)


def test_a_window_and_experts():
    config = tiny_config(**SIZES)
    windowed = tiny_config(**SIZES, layer_kinds=(dataclasses.replace(config.layer_kinds[0], window=8),))
    full, seen = (token_flops(abstract_decoder(each), Full().trains, LENGTH).forward for each in (config, windowed))
    keys = sum(min(place + 1, 8) for place in range(LENGTH)) / LENGTH
    assert full - seen == pytest.approx(3 * 4 * config.num_heads * config.head_dim * ((LENGTH + 1) / 2 - keys))
    kinds = [dataclasses.replace(config.layer_kinds[0], window=window) for window in (None, 8, 5000)]
    mixture = tiny_config(**SIZES, layer_kinds=tuple(kinds), layer_pattern=(1, 0, 2))
    products = 4 * mixture.num_heads * mixture.head_dim
    expected = [products * each for each in (keys, (LENGTH + 1) / 2, (LENGTH + 1) / 2)]
    assert mixing_flops(mixture, LENGTH) == pytest.approx(expected)
    mamba = HYBRID_KINDS[3].mixer
    both = dataclasses.replace(config, layer_kinds=(LayerKind(rope=None, mixer=SideBySideConfig(mamba2=mamba)),))
    assert mixing_flops(both, LENGTH) == pytest.approx([expected[1] + 4 * 64 * 8] * 3)
    experts = ExpertsConfig(count=8, per_token=2, renormalise=True, balance_coefficient=0.0)
    mixed = token_flops(abstract_decoder(tiny_config(**SIZES, experts=experts)), Full().trains, LENGTH).forward
    # Two feed-forwards instead of one, and the router.
    assert mixed - full == pytest.approx(3 * 2 * (3 * 64 * 96 + 64 * 8))
    shared = dataclasses.replace(experts, shared_intermediate_size=40)
    both = token_flops(abstract_decoder(tiny_config(**SIZES, experts=shared)), Full().trains, LENGTH).forward
    assert both - mixed == pytest.approx(3 * 2 * (3 * 64 * 40 + 64))
    first = tiny_config(**SIZES, experts=dataclasses.replace(experts, intermediate_size=48), dense_layers=1)
    # One layer as without experts, two with feed-forwards of half the width.
    dense = token_flops(abstract_decoder(first), Full().trains, LENGTH).forward
    assert dense - full == pytest.approx(2 * 2 * 64 * 8)


def test_peaks_by_the_names_that_devices_have():
    for kind, tera in (
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
    ):
        assert peak_flops(kind) == pytest.approx(tera * 1e12), kind
    assert peak_flops("cpu") is None
    assert peak_flops("Tesla T4", "float16") == 65e12
    # It makes float32 of bfloat16.
    assert peak_flops("Tesla T4", "bfloat16") == peak_flops("Tesla T4", "float32") == 8.1e12
    assert peak_flops("NVIDIA L4", "float16") == peak_flops("NVIDIA L4")
    assert peak_flops("NVIDIA L4", "float32") == 30.3e12
    assert peak_flops("TPU v5p", "float32") == pytest.approx(76.5e12)
    assert peak_flops("NVIDIA L4", "float64") is None
