"""Generation with a cache: greedy text is that of transformers, and rows do not know of each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.family_configs import CONFIGS, config_json
from contracts.test_families import reference_model
from inputs import random_weights, tiny_config

from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import FLOAT32
from cpt_jax.models.config import LayerKind
from cpt_jax.models.decoder import abstract_decoder, apply, logits
from cpt_jax.models.families import family_for, llama
from cpt_jax.models.generate import Generation, _functions, generate
from cpt_jax.models.mamba2 import Mamba2Config
from cpt_jax.models.rope import LongRoPE, Rope
from cpt_jax.models.sampling import Sampling
from cpt_jax.models.short_conv import ShortConvConfig
from cpt_jax.recipe.model import load_model


@pytest.fixture(scope="module")
def tiny(tiny_model):
    model = load_model(tiny_model)
    return model.network, model.on_device(FLOAT32)


def some_prompts(sizes, rows: int) -> list[list[int]]:
    return [np.random.default_rng(size).integers(3, rows, size).tolist() for size in sizes]


def greedy_of_transformers(reference, prompts, new_tokens: int) -> list[list[int]]:
    """Each prompt alone."""
    import torch

    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        texts.append(found[0, len(prompt) :].tolist())
    return texts


def test_greedy_is_that_of_transformers(tiny_model, tiny):
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prompts = some_prompts((1, 5, 70), 320)
    expected = greedy_of_transformers(reference, prompts, 30)
    assert generate(*tiny, prompts, new_tokens=30) == expected
    for prompt, text in zip(prompts, expected, strict=True):
        assert generate(*tiny, [prompt], new_tokens=30) == [text]


# A window of 6 tokens; prompts on both sides of 16 tokens, LongRoPE's original length, and of 24, dynamic's.
FAMILIES = [
    ("llama", "one key head, llama3"),
    ("llama", "dynamic"),
    ("gemma3_text", "as released"),
    ("gpt_neox", "as released"),
    ("gpt_oss", "as released"),
    ("qwen3_moe", "renormalised"),
    ("qwen2_moe", "window, head dimension, activation"),
    ("phi3", "longrope, longer"),
    ("granite", "as released"),
    ("cohere2", "as released"),
    ("ministral3", "as released"),
    ("smollm3", "windows, head dimension"),
    ("qwen3_5_text", "as released"),
    ("qwen3_5_text", "not periodic, one value head a key head"),
    ("qwen3_next", "by interval, three of four"),
    ("lfm2", "as released"),
    ("lfm3", "as released"),
    ("gemma4_text", "as released"),
    ("granitemoehybrid", "as released"),
    ("falcon_h1", "as released"),
    ("nemotron_h", "as released"),
    ("gemma4_text", "inputs of layers, shared keys, double width"),
    ("youtu", "untied, whole queries, biases, yarn"),
    ("minicpm3", "as released"),
    ("deepseek_v3", "as released"),
    ("mistral4", "as released"),
    ("lfm2_moe", "as released"),
    ("nemotron_h", "experts in a smaller space"),
    ("minimax_m2", "as released"),
    ("hunyuan_v1_dense", "as released"),
    ("glm4_moe", "groups, norms of heads, two dense"),
]


@pytest.mark.parametrize(("model_type", "name"), FAMILIES)
def test_greedy_of_every_kind_of_layer_is_that_of_transformers(model_type, name, tmp_path):
    assert name in CONFIGS[model_type]
    raw = config_json(model_type, name)
    reference = reference_model(raw, tmp_path)
    model = load_model(tmp_path)
    prompts = some_prompts((2, 9, 16, 18), raw["vocab_size"])
    new_tokens = min(40, model.config.context_length - 18)
    expected = greedy_of_transformers(reference, prompts, new_tokens)
    assert generate(model.network, model.on_device(FLOAT32), prompts, new_tokens=new_tokens) == expected


def test_a_text_that_is_read_anew_leaves_states_where_it_ends():
    """Past 24 tokens a text is turned otherwise from its beginning; layers that do not attend keep a state of it."""
    factors = dict(short_factor=(1.0,) * 4, long_factor=(1.0, 2.0, 4.0, 8.0))
    stretched = Rope(theta=1e4, dim=8, scaling=LongRoPE(**factors, original_length=24, attention_factor=1.1))
    others = (
        ShortConvConfig(kernel_size=4),
        Mamba2Config(heads=4, groups=2, head_dim=8, state_size=8, kernel_size=4),
    )
    kinds = (LayerKind(rope=stretched), *(LayerKind(rope=None, mixer=mixer) for mixer in others))
    config = tiny_config(num_layers=3, layer_kinds=kinds, layer_pattern=(1, 2, 0))
    network, weights = abstract_decoder(config), jax.tree.map(jnp.asarray, random_weights(config))

    prompts = some_prompts((20, 23, 30), 320)
    found = generate(network, weights, prompts, new_tokens=20)
    # What each token of the texts was drawn behind, read at once.
    parts = [prompt + text[:count] for prompt, text in zip(prompts, found, strict=True) for count in range(len(text))]
    expected = [token for text in found for token in text]
    tokens = jnp.asarray([part + [0] * (64 - len(part)) for part in parts])
    ends = jnp.asarray([len(part) for part in parts])

    @jax.jit
    def following(tokens):
        places = jnp.broadcast_to(jnp.arange(64)[None], tokens.shape)
        inside = (places < ends[:, None]).astype(jnp.int32)
        hidden = apply(network, weights, tokens, places, inside, compute_dtype="float32")
        last = jnp.take_along_axis(hidden, ends[:, None, None] - 1, axis=1)
        return logits(network, weights, last, compute_dtype="float32")[:, 0].argmax(-1)

    assert following(tokens).tolist() == expected


@pytest.mark.parametrize(
    ("name", "changes", "length"),
    [
        ("dynamic", {}, 48),
        ("yarn", dict(max_position_embeddings=16), 64),
        # Stretched already.
        ("yarn", {}, 64),
        ("one key head, llama3", {}, 64),
    ],
)
def test_the_longer_texts_of_a_stretched_rotation_fit(name, changes, length):
    assert llama.config_from_hf(config_json("llama", name) | changes).context_length == length


def test_the_cache_is_in_the_computations_type_and_its_memory_is_used_again(tiny):
    network, weights = tiny
    read_prompts, read_tokens = _functions(network, jnp.dtype("bfloat16"))
    _, caches = read_prompts(weights, np.ones((1, 64), np.int32), np.zeros(1, np.int32), np.int32(63), length=128)
    assert caches.keys() == {"attention"}
    cache = caches["attention"]
    assert [(part.dtype, part.shape) for part in cache.parts] == [(jnp.bfloat16, (2, 1, 2, 128, 8))] * 2
    _, after = read_tokens(weights, jnp.ones(1, jnp.int32), np.zeros(1, np.int32), caches, np.int32(64))
    assert all(part.is_deleted() for part in cache.parts)
    assert [part.shape for part in after["attention"].parts] == [(2, 1, 2, 128, 8)] * 2


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "one key head, llama3"),
        ("gemma4_text", "inputs of layers, shared keys, double width"),
        ("falcon_h1", "as released"),
        ("deepseek_v3", "as released"),
    ],
)
def test_a_token_is_written_where_the_cache_is(model_type, name):
    """A step with a hundred times as long a cache takes next to no memory besides more."""
    raw = config_json(model_type, name)
    config = family_for(raw).config_from_hf(raw)
    network = abstract_decoder(config)
    read_prompts, read_tokens = _functions(network, jnp.dtype("float32"))
    taken, sizes = [], []
    for length in (512, 51_200):
        first = jax.ShapeDtypeStruct((2,), jnp.int32)
        prompt = jax.ShapeDtypeStruct((2, 64), jnp.int32)
        _, caches = jax.eval_shape(
            functools.partial(read_prompts, length=length), network.shapes, prompt, first, np.int32(63)
        )
        compiled = read_tokens.lower(network.shapes, first, first, caches, np.int32(64)).compile()
        taken.append(compiled.memory_analysis().temp_size_in_bytes)
        sizes.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches)))
    assert taken[1] - taken[0] < 0.01 * (sizes[1] - sizes[0])


def test_few_shapes_are_compiled(tiny):
    network, weights = tiny
    functions = _functions(network, jnp.dtype("float32"))
    for sizes in ((3, 4, 5), (3, 4, 40)):
        generate(network, weights, some_prompts(sizes, 320), new_tokens=8)
    before = [function._cache_size() for function in functions]
    for sizes, new_tokens in (((1, 64, 2, 9), 5), ((20, 30, 40), 64), ((7, 7, 7, 8), 2)):
        generate(network, weights, some_prompts(sizes, 320), new_tokens=new_tokens, sampling=Sampling(temperature=1.0))
    assert [function._cache_size() for function in functions] == before


def test_the_same_seed_draws_the_same_and_another_does_not(tiny):
    prompts = some_prompts((4, 20), 320)
    draw = lambda seed: generate(*tiny, prompts, new_tokens=20, sampling=Sampling(temperature=1.0, seed=seed))  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


def test_a_row_is_what_it_is_alone(tiny):
    """Greedy or drawn, whatever the other rows' lengths; equal prompts draw different texts."""
    prompts = [*some_prompts((4, 90, 20), 320), *some_prompts((4,), 320)]
    for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.95, seed=5)):
        together = generate(*tiny, prompts, new_tokens=20, sampling=sampling)
        for row, prompt in enumerate(prompts):
            alone = Generation(*tiny, [prompt], new_tokens=20, sampling=sampling, numbers=[row])
            assert [token for _, token in alone] == together[row]
    assert together[0] != together[3]


def test_rows_end_at_their_end_tokens_and_the_others_go_on(tiny):
    prompts = some_prompts((3, 12, 6), 320)
    whole = generate(*tiny, prompts, new_tokens=30)
    ends = (whole[0][4], whole[1][11])
    places = [min([text.index(end) for end in ends if end in text] or [30]) for text in whole]
    assert min(places) < max(places)
    expected = [text[:place] for text, place in zip(whole, places, strict=True)]
    assert generate(*tiny, prompts, new_tokens=30, end_ids=ends) == expected


def test_a_stopped_row_gives_nothing_more(tiny):
    prompts = some_prompts((3, 12), 320)
    whole = generate(*tiny, prompts, new_tokens=10)
    generation, found = Generation(*tiny, prompts, new_tokens=10), [[], []]
    for row, token in generation:
        found[row].append(token)
        if len(found[0]) == 4:
            generation.stop(0)
    assert found == [whole[0][:4], whole[1]]


def test_prompts_that_cannot_be_continued_are_told(tiny):
    with pytest.raises(UserError, match="prompt 2 is empty"):
        generate(*tiny, [[1], []], new_tokens=3)
    with pytest.raises(UserError, match="context of 256: shorten the prompt, or ask for 6 new tokens"):
        generate(*tiny, [[1] * 250], new_tokens=10)
    with pytest.raises(UserError, match="new tokens are 0"):
        generate(*tiny, [[1]], new_tokens=0)
    assert generate(*tiny, [], new_tokens=3) == []
