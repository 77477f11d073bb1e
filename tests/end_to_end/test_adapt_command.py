"""`cpt adapt`: a run without a recipe, of text, and of conversations beside it."""

import json

import pytest
from commands import call, cpt
from inputs import chinese, english, write_jsonl

pytestmark = pytest.mark.slow
CHAT = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    write_jsonl(root / "zh.jsonl", chinese(400))
    write_jsonl(root / "en.jsonl", english(300))
    return root


def test_adapt_needs_no_recipe(place, tiny_model):
    shape = ["--stages.0.batch_size", 4, "--stages.1.batch_size", 4, "--evaluation.sequence_length", 128]
    lengths = [
        "--stages.0.sequence_length",
        64,
        "--stages.1.sequence_length",
        64,
        "--vocabulary.limits.unreachable_pieces",
        1.0,
    ]
    done = cpt(
        "adapt", "--base", tiny_model, "--new", "zh=zh.jsonl", "--replay", "en=en.jsonl", "--workdir", "adapted",
        "--new-tokens", 30, "--tokens", 4000, *shape, *lengths, cwd=place,
    )  # fmt: skip
    assert "25% of the tokens" in done.stderr
    assert done.stderr.index("replay") < done.stderr.index("steps,")
    config = json.loads((place / "adapted" / "config.json").read_text())
    assert config["vocabulary"]["extension"]["new_tokens"] == 30
    assert (place / "adapted" / "export" / "model.safetensors").exists()


def test_conversations_are_mixed_in(place, tiny_model, monkeypatch, capsys):
    """A domain of conversations beside text, by a template that the base does not have: the tokenizer grows on what
    they say, their answers alone are learnt and measured, and the export writes them as they were learnt."""
    from transformers import AutoTokenizer

    (place / "chat.jinja").write_text(CHAT)
    turns = zip(english(200, seed=5), chinese(200, seed=6), strict=True)
    talks = [[{"role": "user", "content": asked}, {"role": "assistant", "content": told}] for asked, told in turns]
    talks[7] = [{"role": "user", "content": "nobody answers"}]
    (place / "talk.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    arguments = [
        "adapt", "--base", tiny_model, "--new", "zh=zh.jsonl", "talk=talk.jsonl", "--replay", "en=en.jsonl",
        "--chat", "talk", "--workdir", "chatted", "--new-tokens", 20, "--tokens", 10_000,
        "--vocabulary.limits.unreachable_pieces", 1.0, "--evaluation.sequence_length", 128,
    ]  # fmt: skip
    for stage in (0, 1):
        arguments += [f"--stages.{stage}.batch_size", 4, f"--stages.{stage}.sequence_length", 64]
    monkeypatch.chdir(place)
    status, _, errors = call(capsys, *arguments)
    assert status == 2
    assert "has no chat template: give a Jinja file (--chat-template FILE)" in errors
    cpt(*arguments, "--chat-template", "chat.jinja", cwd=place)
    run = place / "chatted"
    manifest = json.loads((run / "data" / "talk" / "manifest.json").read_text())
    assert manifest["skipped"]["no assistant's message"] == 1
    assert 0 < manifest["trained_tokens"] < manifest["tokens"]
    entries = json.loads((run / "eval.json").read_text())
    values = {(entry["stage"], entry["weights"], entry["domain"]): entry for entry in entries}
    assert values["lora", "last", "talk"]["bits_per_byte"] < 0.7 * values["base", "last", "talk"]["bits_per_byte"]
    held = [json.loads(line)["messages"] for line in (run / "data" / "talk" / "heldout.jsonl").read_text().splitlines()]
    assert values["base", "last", "talk"]["bytes"] == sum(len(talk[1]["content"].encode()) for talk in held)
    lines = [json.loads(line) for line in (run / "stages" / "2-lora" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 0 for line in lines)
    exported = AutoTokenizer.from_pretrained(run / "export")
    assert exported.apply_chat_template(held[0], tokenize=False).startswith("user: ")
    spec = ["--data", "talk=chatted/data/talk/heldout.jsonl", "--chat", "talk"]
    status, _, errors = call(capsys, "eval", "--model", "chatted", *spec, "--json", "talk.json")
    assert status == 0, errors
    [again] = json.loads((place / "talk.json").read_text())["results"]
    assert again["bytes"] == values["base", "last", "talk"]["bytes"]
