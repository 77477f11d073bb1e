"""`cpt generate`: text is shown in whole characters, up to a stop string; a prompt's is the same alone and in a batch."""

import json
import re
import shutil

import pytest
from inputs import english, hf_config, random_weights, tiny_config, write_sentencepiece, write_tokenizer

from cpt_jax.checkpoint.hf_write import save
from cpt_jax.cli import main
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import FLOAT32
from cpt_jax.models.generate import generate
from cpt_jax.recipe.find import find_model
from cpt_jax.recipe.generate_command import TextStream, read_prompts
from cpt_jax.recipe.model import load_model
from cpt_jax.vocab.tokenizer import Tokenizer


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


def test_bytes_that_are_no_characters_are_shown_as_such(tokenizers):
    tokenizer = tokenizers["pieces"]
    stream = TextStream(tokenizer, tokenizer.encode("the"), ())
    shown = "".join(stream.push(tokenizer.backend.token_to_id("<0xE5>")) for _ in range(20))
    assert shown + stream.finish() == stream.text == "\N{REPLACEMENT CHARACTER}" * 17


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


def test_the_command_streams_the_decoded_text(cpt, tiny_model, tmp_path, monkeypatch):
    model, tokenizer = load_model(tiny_model), Tokenizer(tiny_model)
    ids = [tokenizer.start_id, *tokenizer.encode("the city")]
    [produced] = generate(model.network, model.on_device(FLOAT32), [ids], new_tokens=40, end_ids=(tokenizer.end_id,))
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
    # Without what may be half a character: up to three bytes at the end.
    assert result["text"] == re.sub("\N{REPLACEMENT CHARACTER}{1,3}$", "", tokenizer.decode(expected))


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
