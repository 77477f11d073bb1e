"""Generation with a cache: greedy text is that of transformers, sampling draws from its distribution, rows do not know
of each other; and `cpt generate`."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.family_configs import CONFIGS, config_json
from contracts.test_families import reference_model
from inputs import english, hf_config, random_weights, tiny_config, write_sentencepiece, write_tokenizer

from cpt_jax.checkpoint.hf import save
from cpt_jax.cli import main
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.models.attention import Cache
from cpt_jax.models.families import llama
from cpt_jax.models.generate import Generation, _functions, generate
from cpt_jax.models.sampling import Sampling, choose, filtered, row_keys
from cpt_jax.recipe.find import find_model
from cpt_jax.recipe.generate_command import TextStream, read_prompts
from cpt_jax.recipe.model import load_model
from cpt_jax.vocab.tokenizer import Tokenizer

FLOAT32 = Precision(compute="float32")


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
    ("qwen3_moe", "renormalised"),
    ("phi3", "longrope, longer"),
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
    _, cache = read_prompts(weights, np.ones((1, 64), np.int32), np.zeros(1, np.int32), np.int32(63), length=128)
    assert isinstance(cache, Cache)
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    assert cache.keys.shape == (2, 1, 2, 128, 8)
    _, after = read_tokens(weights, jnp.ones(1, jnp.int32), np.zeros(1, np.int32), cache, np.int32(64))
    assert after.keys.shape == (2, 1, 2, 128, 8)
    assert cache.keys.is_deleted()


def test_few_shapes_are_compiled(tiny):
    network, weights = tiny
    functions = _functions(network, jnp.dtype("float32"))
    generate(network, weights, some_prompts((3, 4, 5), 320), new_tokens=8)
    before = [function._cache_size() for function in functions]
    for sizes, new_tokens in (((1, 64, 2, 9), 5), ((20, 30, 40), 64), ((7, 7, 7, 8), 2)):
        generate(network, weights, some_prompts(sizes, 320), new_tokens=new_tokens, sampling=Sampling(temperature=1.0))
    assert [function._cache_size() for function in functions] == before


WARPED = {
    "temperature": dict(temperature=0.7),
    "top-k": dict(temperature=1.0, top_k=5),
    "top-k above the vocabulary": dict(temperature=1.0, top_k=500),
    "top-p": dict(temperature=1.0, top_p=0.6),
    "the likeliest alone": dict(temperature=1.0, top_p=0.01),
    "all": dict(temperature=1.8, top_k=30, top_p=0.8),
}


@pytest.mark.parametrize("settings", WARPED.values(), ids=WARPED)
def test_the_distribution_is_that_of_the_warpers_of_transformers(settings):
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * np.random.default_rng(0).normal(size=(16, 100)).astype(np.float32)
    expected = TemperatureLogitsWarper(settings["temperature"])(None, torch.tensor(logits))
    if "top_k" in settings:
        expected = TopKLogitsWarper(settings["top_k"])(None, expected)
    if "top_p" in settings:
        expected = TopPLogitsWarper(settings["top_p"])(None, expected)
    found = filtered(jnp.asarray(logits), Sampling(**settings))
    np.testing.assert_array_equal(np.isfinite(found), torch.isfinite(expected).numpy())
    np.testing.assert_allclose(jax.nn.softmax(found), expected.softmax(-1).numpy(), atol=1e-6)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    draws = 20_000
    logits = np.random.default_rng(0).normal(size=12).astype(np.float32)
    sampling = Sampling(temperature=0.8, top_k=6, top_p=0.9)
    expected = np.asarray(jax.nn.softmax(filtered(jnp.asarray(logits)[None], sampling)[0]))
    assert 1 < np.count_nonzero(expected) < 6
    keys = row_keys(3, np.arange(draws, dtype=np.uint32))
    drawn = choose(jnp.tile(jnp.asarray(logits)[None], (draws, 1)), keys, np.int32(7), sampling)
    shares = np.bincount(np.asarray(drawn), minlength=12) / draws
    assert set(np.flatnonzero(shares)) == set(np.flatnonzero(expected))
    # Five standard deviations.
    np.testing.assert_allclose(shares, expected, atol=5 * 0.5 * draws**-0.5)


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=-1.0), "temperature is -1.0: give 0"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature=1.0, top_k=0), "top_k is 0: give at least 1"),
        (dict(temperature=1.0, top_p=0.0), "top_p is 0.0: give a share above 0"),
        (dict(temperature=1.0, top_p=1.5), "top_p is 1.5"),
        (dict(top_p=0.9), "top_p is 0.9 and temperature 0"),
        (dict(top_k=3), "top_k is 3 and temperature 0"),
        (dict(seed=-1), "seed is -1"),
    ],
)
def test_wrong_sampling_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A byte-level one, and a SentencePiece with byte fallback; neither knows a Chinese character."""
    root = tmp_path_factory.mktemp("tokenizers")
    write_tokenizer(root / "bytes", english(300), size=300)
    write_sentencepiece(root / "pieces", english(300), "bpe", 400)
    return {kind: Tokenizer(root / kind) for kind in ("bytes", "pieces")}


def tokens_after(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    return tokenizer.encode(before + text)[len(tokenizer.encode(before)) :]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_a_stream_shows_whole_characters_and_all_of_them(tokenizers, kind):
    tokenizer = tokenizers[kind]
    text = " the old city 国务院，the 🙂 river"
    stream = TextStream(tokenizer, tokenizer.encode("the people"), ())
    shown = [stream.push(token) for token in tokens_after(tokenizer, "the people", text)]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(shown)
    assert "国" in shown
    # It comes bit by bit.
    assert sum(map(bool, shown)) > len(shown) / 3
    assert "".join(shown) + stream.finish() == stream.text == text


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_half_a_character_at_the_end_is_not_shown(tokenizers, kind):
    tokenizer = tokenizers[kind]
    stream = TextStream(tokenizer, tokenizer.encode("the"), ())
    shown = "".join(stream.push(token) for token in tokens_after(tokenizer, "the", " city国")[:-1])
    assert shown + stream.finish() == stream.text == " city"


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_text_is_cut_before_a_stop_string_that_spans_tokens(tokenizers, kind):
    tokenizer = tokenizers[kind]
    text = " water. the city\n\nthe river"
    tokens = tokens_after(tokenizer, "the", text)
    for stop, expected in (
        (("\n\n",), " water. the city"),
        (("ty\n\nth", "river"), " water. the ci"),
        (("nowhere", "e c"), " water. th"),
        (("e city\n\nxyz", "the riverside"), text),
        ((" water",), ""),
    ):
        stream, shown = TextStream(tokenizer, tokenizer.encode("the"), stop), []
        for token in tokens:
            shown.append(stream.push(token))
            # Nothing of a stop string is ever shown.
            assert expected.startswith("".join(shown))
            if stream.stopped:
                break
        assert stream.stopped == (expected != text)
        assert "".join(shown) + stream.finish() == stream.text == expected


@pytest.fixture
def cpt(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        main(["generate", *map(str, arguments)])
        return capsys.readouterr()

    return call


def test_the_command_streams_the_decoded_text(cpt, tiny_model, tiny, tmp_path, monkeypatch):
    tokenizer = Tokenizer(tiny_model)
    ids = [tokenizer.start_id, *tokenizer.encode("the city")]
    [produced] = generate(*tiny, [ids], new_tokens=40, end_ids=(tokenizer.end_id,))
    text = tokenizer.decode(produced).rstrip("\N{REPLACEMENT CHARACTER}")
    done = cpt("--model", tiny_model, "--prompt", "the city", "--new-tokens", 40, "--json", "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["results"] == [
        {"prompt": "the city", "text": text, "tokens": len(produced), "finish_reason": "length"}
    ]
    assert done.out == "the city" + text + "\n"
    assert "40 tokens, " in done.err
    assert "tokens per second" in done.err
    stop = text[7:10]
    assert cpt("--model", tiny_model, "--prompt", "the city", "--new-tokens", 40, "--stop", "xyzzy", stop).out == (
        "the city" + text[: text.index(stop)] + "\n"
    )


def test_a_batch_is_what_each_prompt_is_alone(cpt, tiny_model, tmp_path):
    """Eleven prompts: more than are read together."""
    prompts = [" ".join(english(1, seed)[0].split()[: 2 + 3 * seed]) for seed in range(11)]
    (tmp_path / "p.txt").write_text("\n".join(prompts[:6]) + "\n\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    assert read_prompts(tmp_path / "p.txt") == prompts[:6]
    common = ("--model", tiny_model, "--new-tokens", 8, "--json", "out.json")
    out = cpt(*common, "--prompts", "p.jsonl").out
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["prompt"] for result in results] == prompts
    for number, result in enumerate(results, start=1):
        assert f"[{number}/11]\n{result['prompt']}{result['text']}\n" in out
    for number in (0, 10):
        cpt(*common, "--prompt", prompts[number])
        assert json.loads((tmp_path / "out.json").read_text())["results"] == [results[number]]


def test_a_seed_draws_the_same_text_again(cpt, tiny_model):
    common = ("--model", tiny_model, "--prompt", "the", "--new-tokens", 20, "--temperature", 1, "--top-p", 0.9)

    def drawn(seed: int) -> str:
        return cpt(*common, "--seed", seed).out

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_chat_and_the_end_of_its_turn(cpt, tmp_path):
    write_tokenizer(tmp_path / "tokenizer", english(300), kind="qwen")
    config = tiny_config()
    save(tmp_path / "model", config, random_weights(config), hf_config(config), tmp_path / "tokenizer")
    model, tokenizer = load_model(tmp_path / "model"), Tokenizer(tmp_path / "model")
    [ids] = [encoding.ids for encoding in tokenizer.encode_marked(["<|im_start|>the city<|im_end|>"])]
    assert len(ids) == 2 + len(tokenizer.encode("the city"))
    [produced] = generate(model.network, model.on_device(FLOAT32), [ids], new_tokens=10)
    # The turn ends with what the model says at some time.
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [319, produced[5]]}))
    out = cpt(
        "--model", tmp_path / "model", "--prompt", "the city", "--chat", "--new-tokens", 10, "--json", "o.json"
    ).out
    [result] = json.loads((tmp_path / "o.json").read_text())["results"]
    expected = produced[: produced.index(produced[5])]
    assert result["tokens"] == len(expected)
    assert result["finish_reason"] == "stop"
    assert out == result["text"] + "\n"
    assert result["text"] == tokenizer.decode(expected).rstrip("\N{REPLACEMENT CHARACTER}")


def test_a_runs_directory_stands_for_its_export(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"name": "run", "stages": []}))
    with pytest.raises(UserError, match="is a run without an export: finish it with `cpt run"):
        find_model(str(tmp_path))
    shutil.copytree(tiny_model, tmp_path / "export")
    assert find_model(str(tmp_path)) == tmp_path / "export"
    assert find_model(str(tiny_model)) == tiny_model


WRONG = {
    "no prompt": ([], "give --prompt TEXT or --prompts FILE"),
    "no file": (["--prompts", "nowhere.txt"], "prompts nowhere.txt cannot be read"),
    "empty file": (["--prompts", "empty.txt"], "prompts empty.txt is empty: write one prompt a line"),
    "no json": (["--prompts", "wrong.jsonl"], "wrong.jsonl:1 is no JSON"),
    "no field": (["--prompts", "other.jsonl"], 'other.jsonl:1 has no text in a field "prompt"'),
    "no tokens": (["--prompt", "the", "--new-tokens", "0"], "--new-tokens is 0: give at least 1"),
    "too many": (["--prompt", "the", "--new-tokens", "300"], "do not fit in the model's context of 256"),
    "empty stop": (["--prompt", "the", "--stop", ""], "--stop is empty"),
    "no template": (["--prompt", "the", "--chat"], "has no chat template: leave out --chat"),
    "top-p alone": (["--prompt", "the", "--top-p", "0.9"], "give a temperature above 0"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_exits_with_2(cpt, tiny_model, tmp_path, capsys, arguments, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "wrong.jsonl").write_text("the city\n")
    (tmp_path / "other.jsonl").write_text('{"text": "the city"}\n')
    with pytest.raises(SystemExit) as stop:
        cpt("--model", tiny_model, *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
