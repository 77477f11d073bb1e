"""The commands besides the pipeline, on a tiny model."""

import json
import shutil

import numpy as np
import pytest
from inputs import chinese, english, write_jsonl
from safetensors.numpy import load_file

from cpt_jax.cli import main
from cpt_jax.cli.parser import ROWS
from cpt_jax.data.filters import repeats
from cpt_jax.vocab.init_rows import NAMED_ROWS

CHAT = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("commands")
    write_jsonl(root / "zh.jsonl", chinese(200))
    write_jsonl(root / "en.jsonl", english(100))
    return root


@pytest.fixture
def cpt(place, monkeypatch, capsys):
    monkeypatch.chdir(place)

    def call(*arguments) -> str:
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return call


def test_tokenizer_model_eval_and_data(cpt, place, tiny_model):
    out = cpt(
        "tokenizer", "extend", "--base", tiny_model, "--corpus", "zh.jsonl", "--new-tokens", 25, "--out", "tokenizer"
    )
    assert "25 new pieces" in out
    out = cpt(
        "tokenizer",
        "report",
        "--base",
        tiny_model,
        "--tokenizer",
        "tokenizer",
        "--corpus",
        "zh.jsonl",
        "en.jsonl",
        "--json",
        "t.json",
    )
    report = json.loads((place / "t.json").read_text())
    rates = {corpus["name"]: corpus for corpus in report["corpora"]}
    assert rates["zh"]["extended"]["tokens_per_character"] < rates["zh"]["base"]["tokens_per_character"]
    assert report["new_pieces"] == 25
    cpt("model", "extend", "--model", tiny_model, "--tokenizer", "tokenizer", "--out", "grown", "--json", "g.json")
    assert json.loads((place / "g.json").read_text()) == {"chosen": "default", "probe": []}
    old, new = (load_file(d / "model.safetensors")["model.embed_tokens.weight"] for d in (tiny_model, place / "grown"))
    np.testing.assert_array_equal(new[: len(old)], old)
    assert len(new) == len(old) + 25
    assert "embed/base" in cpt("model", "inspect", "--model", "grown")
    out = cpt(
        "eval",
        "--model",
        "grown",
        "--against",
        tiny_model,
        "--data",
        "zh=zh.jsonl",
        "en=en.jsonl",
        "--max-bytes",
        2000,
        "--json",
        "e.json",
    )
    results = json.loads((place / "e.json").read_text())["results"]
    assert len(results) == 4
    assert {entry["domain"] for entry in results} == {"zh", "en"}
    assert "difference" in out
    assert "tokens" in cpt("data", "prepare", "--tokenizer", "grown", "--input", "zh=zh.jsonl", "--out", "data")
    assert json.loads((place / "data" / "zh" / "manifest.json").read_text())["records"] == 200
    assert cpt("generate", "--model", "grown", "--prompt", "the city", "--new-tokens", 3).startswith("the city")


def test_data_is_described_as_it_is_and_as_it_would_be(cpt, place, tiny_model):
    write_jsonl(place / "twice.jsonl", [*english(100), *english(10), "<b>x & y</b> " * 9, "|--|--|"])
    given = ("twice=twice.jsonl", "zh=zh.jsonl")
    cleaning = ("--duplicates", "--filter", "symbols", "repeats", "--evaluation", "en.jsonl", "--evaluation-words", 300)
    out = cpt("data", "stats", *given, *cleaning, "--workers", 1, "--json", "s.json", "--html", "s.html")
    assert " x duplicate (" in out
    twice, zh = json.loads((place / "s.json").read_text())["corpora"]
    kept = [text for text in english(100) if repeats(text) is None]
    assert 90 < len(kept) < 100
    assert twice["left_out"]["more symbols than letters"] == 2
    assert twice["left_out"]["a fifth of the text is one pair of words"] >= 100 - len(kept)
    assert twice["documents"] == len(kept) == 112 - sum(twice["left_out"].values())
    assert twice["bytes"] == sum(len(text.encode()) for text in kept)
    assert twice["tokens"] is None
    assert (twice["scripts"].keys() - {"Common"}, zh["scripts"].keys() - {"Common"}) == ({"Latin"}, {"Han"})
    assert max(twice["languages"], key=twice["languages"].get) == "en"
    assert sum(twice["character_lengths"].values()) == len(kept)
    page = (place / "s.html").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "&lt;b&gt;x &amp; y&lt;/b&gt;" in page
    cpt("data", "prepare", "--tokenizer", tiny_model, "--input", *given, *cleaning, "--out", "clean", "--workers", 2)
    cpt("data", "stats", "clean/twice", "--json", "t.json")
    [prepared] = json.loads((place / "t.json").read_text())["corpora"]
    assert prepared["tokens"] > 0
    assert sum(prepared["token_lengths"].values()) == len(kept)
    assert prepared | {"tokens": None, "token_lengths": None} == twice
    for wrong, message in (
        (("data", "stats", "nothing"), "'nothing' is no prepared directory and no NAME=SPEC"),
        (("data", "stats", "a=none.jsonl"), "there is no such file"),
        (("data", "stats", "a=tfds:none_such"), "TFDS has no data set 'none_such'"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, wrong)])
        assert ended.value.code == 2, message


def test_conversations_are_prepared_and_evaluated(cpt, place, tiny_model, monkeypatch):
    talks = [
        {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]}
        for asked, answer in zip(english(40, seed=3), english(40, seed=4), strict=True)
    ]
    (place / "talk.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in [*talks, {"text": "the"}]))
    (place / "chat.jinja").write_text(CHAT)
    chat = ("--chat", "talk", "--chat-template", "chat.jinja")
    inputs = ("talk=talk.jsonl", "en=en.jsonl")
    out = cpt("data", "prepare", "--tokenizer", tiny_model, "--input", *inputs, *chat, "--out", "chats")
    manifests = {name: json.loads((place / "chats" / name / "manifest.json").read_text()) for name in ("talk", "en")}
    assert manifests["talk"]["records"] == 40
    assert 0.3 < manifests["talk"]["trained_tokens"] / manifests["talk"]["tokens"] < 0.7
    assert manifests["en"]["trained_tokens"] == manifests["en"]["tokens"]
    assert "of them learnt); left out: 1 x no conversation" in out
    cpt("eval", "--model", tiny_model, "--data", *inputs, *chat, "--json", "chat.json")
    results = {result["domain"]: result for result in json.loads((place / "chat.json").read_text())["results"]}
    assert results["talk"]["bytes"] == sum(len(answer.encode()) for answer in english(40, seed=4))
    # Two models whose templates take different conversations are compared on those that both take.
    strict = "{% if 'river' in messages[0]['content'] %}{{ raise_exception('no rivers') }}{% endif %}" + CHAT
    for name, template in (("plain", CHAT), ("strict", strict)):
        shutil.copytree(tiny_model, place / name)
        (place / name / "chat_template.jinja").write_text(template)
    both = ("--model", "plain", "--against", "strict", "--data", "talk=talk.jsonl", "--chat", "talk")
    told: list[str] = []
    monkeypatch.setattr("cpt_jax.recipe.evaluate_command.say", told.append)
    cpt("eval", *both, "--json", "both.json")
    results = json.loads((place / "both.json").read_text())["results"]
    taken = [pair for pair in zip(english(40, seed=3), english(40, seed=4), strict=True) if "river" not in pair[0]]
    assert [result["bytes"] for result in results] == [sum(len(answer.encode()) for _, answer in taken)] * 2
    assert 1 < 40 - len(taken) < 40
    assert len(told) == 1
    assert told[0].startswith(
        f"talk: {len(taken)} documents; left out: {40 - len(taken)} x chat template: no rivers, 1 x no conversation"
    )


def test_every_kind_of_rows_can_be_asked_for():
    assert set(ROWS) == {*NAMED_ROWS, "wechsel"}


def test_a_probe_takes_the_rows_that_learn_best(cpt, place, tiny_model):
    """The model written holds the chosen kind's rows, untrained; the old rows are the base's."""
    cpt("tokenizer", "extend", "--base", tiny_model, "--corpus", "zh.jsonl", "--new-tokens", 25, "--out", "probed-t")
    common = ("--model", tiny_model, "--tokenizer", "probed-t", "--corpus", "zh.jsonl", "--seed", 3)
    kinds = ("random", "mean", "subword-mean", "focus")
    out = cpt("model", "extend", *common, "--init", *kinds, "--probe", 8, "--out", "probed", "--json", "probe.json")
    told = json.loads((place / "probe.json").read_text())
    after = {entry["name"]: entry["bits_per_byte"]["8"] for entry in told["probe"]}
    assert set(after) == set(kinds)
    assert told["chosen"] == min(after, key=after.__getitem__)
    assert f"probed: {told['chosen']}" in out
    # Training the new rows helps whatever they begin with.
    assert all(entry["bits_per_byte"]["8"] < entry["bits_per_byte"]["0"] for entry in told["probe"])
    cpt("model", "extend", *common, "--init", told["chosen"], "--out", "alone")
    name = "model.embed_tokens.weight"
    probed, alone, base = (
        load_file(d / "model.safetensors")[name] for d in (place / "probed", place / "alone", tiny_model)
    )
    if told["chosen"] != "focus":  # made from the text that was not held out
        np.testing.assert_array_equal(probed, alone)
    np.testing.assert_array_equal(probed[: len(base)], base)


WRONG = {
    "tokenizer too large": (["eval", "--model", "{mixed}", "--data", "en=en.jsonl"], "run `cpt model extend`"),
    "no tokenizer": (
        ["tokenizer", "report", "--base", "{empty}", "--tokenizer", "{empty}", "--corpus", "en.jsonl"],
        "no tokenizer.json",
    ),
    "no pieces": (
        ["tokenizer", "extend", "--base", "{model}", "--corpus", "en.jsonl", "--new-tokens", "0", "--out", "x"],
        "new_tokens is 0",
    ),
    "no corpus": (["eval", "--model", "{model}", "--data", "en=nowhere.jsonl"], "there is no such file"),
    "rows without text": (
        ["model", "extend", "--model", "{model}", "--tokenizer", "{model}", "--init", "focus", "--out", "x"],
        "rows 'focus' are made from text of the new domain: give --corpus SPEC",
    ),
    "two kinds of rows": (
        ["model", "extend", "--model", "{model}", "--tokenizer", "{model}", "--init", "mean", "random", "--out", "x"],
        "--init names 2 kinds of rows: give one, or --probe STEPS",
    ),
    "rows without vectors": (
        ["model", "extend", "--model", "{model}", "--tokenizer", "{model}", "--init", "wechsel", "--out", "x"],
        "give --vectors OLD.vec NEW.vec",
    ),
    "chat as text": (
        ["data", "prepare", "--tokenizer", "{model}", "--input", "talk=talk.jsonl", "--out", "refused"],
        "no text field 'text' but a conversation: give --chat talk",
    ),
    "no chat template": (
        ["data", "prepare", "--tokenizer", "{model}", "--input", "t=talk.jsonl", "--chat", "t", "--out", "refused"],
        "has no chat template: give a Jinja file (--chat-template FILE)",
    ),
    "other chat": (
        ["eval", "--model", "{model}", "--data", "t=talk.jsonl", "--chat", "talk"],
        "--chat names 'talk', but the corpora are t",
    ),
    "not named": (["eval", "--model", "{model}", "--data", "en.jsonl"], "is not NAME=SPEC"),
    "no run": (["export", "--run", "data", "--out", "x"], "no run's directory"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_exits_with_2(place, tiny_model, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(place)
    talk = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "city"}]
    (place / "talk.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    mixed = place / "mixed"
    if not mixed.exists():
        shutil.copytree(tiny_model, mixed)
        document = json.loads((mixed / "tokenizer.json").read_text())
        document["added_tokens"].append({**document["added_tokens"][0], "id": 320, "content": "<extra>"})
        (mixed / "tokenizer.json").write_text(json.dumps(document))
    empty = place / "empty"
    empty.mkdir(exist_ok=True)
    with pytest.raises(SystemExit) as stop:
        main([argument.format(model=tiny_model, mixed=mixed, empty=empty) for argument in arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
