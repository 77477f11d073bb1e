"""Many texts from a few rows: each is what it is alone, wherever in the cache it is written, whatever lay there before."""

import collections
import itertools

import numpy as np
import pytest
from contracts.family_configs import config_json
from contracts.test_families import reference_model

from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import FLOAT32
from cpt_jax.models import continuous
from cpt_jax.models.continuous import ContinuousGeneration, Request
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.models.families import family_for
from cpt_jax.models.generate import Generation, generate
from cpt_jax.models.sampling import GREEDY, Sampling
from cpt_jax.recipe.model import load_model

NEW = 12


@pytest.fixture(scope="module")
def tiny(tiny_model):
    model = load_model(tiny_model)
    return model.network, model.on_device(FLOAT32)


@pytest.fixture
def places(monkeypatch) -> list[int]:
    """Those of the cache in which tokens are written, and -1 where it is moved."""
    found, step, moved = [], continuous._step, continuous._moved

    def stepped(*arguments):
        found.append(int(arguments[7]))
        return step(*arguments)

    def told(caches, by):
        found.append(-1)
        return moved(caches, by)

    monkeypatch.setattr(continuous, "_step", stepped)
    monkeypatch.setattr(continuous, "_moved", told)
    return found


def prompts_of(sizes, rows: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, rows, size).tolist() for size in sizes]


def texts_of(model, prompts, *, rows=3, sampling=GREEDY, end_ids=(), longest=40) -> list[list[int]]:
    waiting = collections.deque(Request(number=number, prompt=prompt) for number, prompt in enumerate(prompts))
    generation = ContinuousGeneration(
        *model,
        lambda: waiting.popleft() if waiting else None,
        rows=rows,
        longest=longest,
        new_tokens=NEW,
        sampling=sampling,
        end_ids=end_ids,
    )
    found = {}
    for text in generation:
        assert text.ended == (len(text.tokens) < NEW)
        assert text.request.number not in found
        found[text.request.number] = text.tokens
    return [found[number] for number in range(len(prompts))]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_p=0.95, seed=5)], ids=["greedy", "drawn"])
def test_a_text_is_what_it_is_alone(tiny, sampling, places):
    prompts = prompts_of([1, 7, 20, 1, 3, 28, 2] * 4, 320)
    ends = range(40, 60)
    expected = []
    for number, prompt in enumerate(prompts):
        alone = Generation(*tiny, [prompt], new_tokens=NEW, sampling=sampling, end_ids=ends, numbers=[number])
        expected.append([token for _, token in alone])
    assert {NEW} < set(map(len, expected))
    assert texts_of(tiny, prompts, sampling=sampling, end_ids=ends) == expected
    # The cache, of 64 places, was gone through several times; each row read its prompts and what it drew, and one more.
    assert places.count(-1) > 3
    assert max(places) == 63
    steps = len(places) - places.count(-1)
    assert steps < 1.2 * sum(len(prompt) + len(text) + 1 for prompt, text in zip(prompts, expected, strict=True)) / 3


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("gemma3_text", "as released"),
        ("gemma4_text", "inputs of layers, shared keys, double width"),
        ("deepseek_v3", "as released"),
        ("qwen3_next", "by interval, three of four"),
        ("falcon_h1", "as released"),
        ("lfm2", "as released"),
    ],
)
def test_of_every_kind_of_layer(model_type, name, tmp_path, places):
    """A text begins in the middle of a row, where states of the one before lie, and goes on behind a move."""
    reference_model(config_json(model_type, name), tmp_path)
    model = load_model(tmp_path)
    loaded = model.network, model.on_device(FLOAT32)
    prompts = prompts_of([2, 9, 16, 5, 11, 3, 7, 1], model.config.vocab_size)
    assert texts_of(loaded, prompts, rows=2) == generate(*loaded, prompts, new_tokens=NEW)
    assert -1 in places


def test_a_prompt_that_begins_with_a_text_goes_on_in_its_row(tiny, places, monkeypatch):
    """A question, which the model draws, and its answer, which follows it and what a template writes between."""
    count, beginning, between = 8, [5, 6], [7, 8, 9]
    sampling = Sampling(temperature=1.0, seed=1)
    drawn = texts_of(tiny, [beginning] * count, sampling=sampling)
    end, times = collections.Counter(token for text in drawn for token in text[1:]).most_common(1)[0]
    assert 1 < times < count

    def asked(late: int = 0) -> tuple[list, int]:
        """What was written, and the steps that it took; answers are asked for a while after their questions are there."""
        answers, numbers, found, calls = [], iter(range(count)), [], itertools.count()

        def following():
            if answers and next(calls) % (late + 1) == late:
                return answers.pop()
            return next((Request(number=n, prompt=beginning) for n in numbers), None)

        places.clear()
        how = dict(rows=2, longest=40, new_tokens=NEW, sampling=sampling, end_ids=[end])
        for text in ContinuousGeneration(*tiny, following, **how):
            found.append((text.request.number, text.tokens))
            if text.request.number < count:
                prompt = [*text.request.prompt, *text.tokens, *[end] * text.ended, *between]
                answers.append(Request(number=text.request.number + 100, prompt=prompt))
        return sorted(found), len(places) - places.count(-1)

    found, steps = asked()
    assert [tokens for _, tokens in found[:count]] == [text[: (*text, end).index(end)] for text in drawn]
    assert len(found) == 2 * count
    # A row that has waited has read other things since.
    assert asked(late=3)[0] == found
    monkeypatch.setattr(continuous._Row, "continues", lambda *_: False)
    anew, more = asked()
    assert anew == found
    # What is not read again: the questions, with two tokens before each of them.
    assert more - steps > sum(2 + len(tokens) for _, tokens in found[:count]) / 2 - 10


def test_texts_that_outgrow_a_rotation_are_refused():
    raw = config_json("phi3", "longrope, longer")
    config = family_for(raw).config_from_hf(raw)
    network = abstract_decoder(config)
    how = dict(rows=1, new_tokens=8, sampling=GREEDY, end_ids=())
    with pytest.raises(
        UserError, match=r"texts of 17 tokens may become longer than 16, .* \(LongRoPE\): ask for fewer"
    ):
        ContinuousGeneration(network, network.shapes, lambda: None, longest=17, **how)
    assert not list(ContinuousGeneration(network, network.shapes, lambda: None, longest=16, **how))
