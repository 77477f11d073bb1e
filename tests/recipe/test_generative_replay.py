"""`cpt data generate`: documents are what the model draws by their numbers; killed, cut off or wanted longer, it goes on."""

import json
import shutil

import pytest
from inputs import english, hf_config, random_weights, tiny_config, write_tokenizer

from cpt_jax.checkpoint.hf_write import save
from cpt_jax.cli import main
from cpt_jax.core.precision import FLOAT32
from cpt_jax.data.chat_template import ChatTemplate
from cpt_jax.data.sources import Corpus, SkipCounts, read
from cpt_jax.models.generate import Generation
from cpt_jax.models.sampling import Sampling
from cpt_jax.recipe import generative_replay
from cpt_jax.recipe.generate_command import end_ids_of
from cpt_jax.recipe.model import load_model
from cpt_jax.vocab.tokenizer import Tokenizer

SAMPLING = Sampling(temperature=1.0, seed=3)


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch):
    monkeypatch.setattr(generative_replay, "fastest_type", lambda: "float32")


def call(*arguments) -> None:
    main(["data", "generate", *map(str, arguments), "--seed", "3"])


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def drawn(directory, prompts, numbers, end_ids, new_tokens) -> list[list[int]]:
    """What the model draws, each row by itself."""
    model, found = load_model(directory), []
    for prompt, number in zip(prompts, numbers, strict=True):
        generation = Generation(
            model.network,
            model.on_device(FLOAT32),
            [prompt],
            new_tokens=new_tokens,
            sampling=SAMPLING,
            end_ids=end_ids,
            numbers=[number],
        )
        found.append([token for _, token in generation])
    return found


def special_ids(tokenizer: Tokenizer) -> set[int]:
    return {tokenizer.backend.token_to_id(token) for token in tokenizer.special_tokens}


def plain(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text without special tokens, whose names would be plain text when it is read."""
    text = tokenizer.decode([token for token in ids if token not in special_ids(tokenizer)])
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def test_documents_are_what_the_model_draws_and_it_goes_on(tiny_model, tmp_path, capsys):
    directory, out, other = tmp_path / "model", tmp_path / "own.jsonl", tmp_path / "other.jsonl"
    shutil.copytree(tiny_model, directory)
    # A random model ends a text once in so many tokens.
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(100, 110))}))
    flags = ("--model", directory, "--document-tokens", 24)
    call(*flags, "--tokens", 100, "--batch", 3, "--out", out)
    assert "generate: 0/100 tokens, drawn 1\n" in capsys.readouterr().err
    tokenizer, first = Tokenizer(directory), lines(out)
    expected = drawn(directory, [[tokenizer.start_id]] * 5, range(5), end_ids_of(directory, tokenizer), 24)
    assert [each["number"] for each in first[:5]] == [0, 1, 2, 3, 4]
    for document, ids in zip(first[:5], expected, strict=True):
        assert document["text"] == plain(tokenizer, ids)
        assert document["tokens"] == len(ids)
        assert document["truncated"] == (len(ids) == 24)
    # As many as are wanted, the last of them whole.
    assert 100 <= sum(each["tokens"] for each in first) < 100 + first[-1]["tokens"]
    # Killed while it wrote a line, called again with more to write, other documents beside them.
    out.write_text(out.read_text() + '{"number": 6, "te')
    call(*flags, "--tokens", 300, "--batch", 2, "--out", out)
    call(*flags, "--tokens", 300, "--batch", 8, "--out", other)
    longer = lines(out)
    assert len(longer) > len(first)
    assert longer[: len(first)] == first
    assert longer == lines(other)
    # Enough is there: the model is not even read.
    content = out.read_bytes()
    call(*flags, "--tokens", 200, "--out", out)
    assert out.read_bytes() == content
    again = read(Corpus(name="own", spec=str(out)), SkipCounts())
    assert [(each.text, each.truncated) for each in again] == [(each["text"], each["truncated"]) for each in longer]
    assert {each["truncated"] for each in longer} == {True, False}
    # Of another seed, or anything else: nothing is mixed, nothing lost.
    with pytest.raises(SystemExit) as stop:
        main(["data", "generate", *map(str, flags), "--tokens", "900", "--seed", "4", "--out", str(out)])
    assert stop.value.code == 2
    assert "is no file of this model and these settings: give another --out" in capsys.readouterr().err
    assert out.read_bytes() == content


def test_questions_and_answers_by_the_chat_template(tmp_path, capsys):
    write_tokenizer(tmp_path / "tokenizer", english(300), kind="qwen")
    config, directory, out = tiny_config(), tmp_path / "model", tmp_path / "chat.jsonl"
    save(directory, config, random_weights(config), hf_config(config), tmp_path / "tokenizer")
    # A random model ends a turn once in so many tokens.
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(100, 120))}))
    call("--model", directory, "--tokens", 400, "--document-tokens", 16, "--batch", 8, "--chat", "--out", out)
    assert "x no whole question and answer" in capsys.readouterr().err
    tokenizer = Tokenizer(directory)
    template = ChatTemplate(tokenizer)
    begin = template.render([{"role": "user", "content": "@"}]).partition("@")[0]
    ends = end_ids_of(directory, tokenizer)
    drawn_special = 0
    for document in lines(out):
        question, answer = document["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        [ids] = [encoding.ids for encoding in tokenizer.encode_marked([begin])]
        [asked] = drawn(directory, [ids], [document["number"]], ends, 16)
        assert question["content"] == plain(tokenizer, asked).strip()
        [ids] = [each.ids for each in tokenizer.encode_marked([template.render([question], prompt=True)])]
        [said] = drawn(directory, [ids], [document["number"] + (1 << 31)], ends, 16)
        assert answer["content"] == plain(tokenizer, said).strip()
        # Both came to an end.
        assert max(len(asked), len(said)) < 16
        assert document["tokens"] == len(asked) + len(said)
        drawn_special += len(special_ids(tokenizer) & {*asked, *said})
    assert drawn_special > 0
    skipped = SkipCounts()
    read_again = list(read(Corpus(name="chat", spec=str(out), format="chat"), skipped))
    assert len(read_again) == len(lines(out)) > 1
    assert not skipped


WRONG = {
    "one text alone": (["--temperature", "0"], "--temperature is 0, which writes the same document every time"),
    "no tokens": (["--tokens", "0"], "--tokens is 0: give at least 1"),
    "no batch": (["--batch", "0"], "--batch is 0: give at least 1"),
    "too long": (["--document-tokens", "300"], "do not fit in the model's context of 256"),
    "no template": (["--chat"], "has no chat template"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_exits_with_2_and_writes_nothing(tiny_model, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        call("--model", tiny_model, "--tokens", "50", "--out", tmp_path / "own.jsonl", *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "own.jsonl").exists()


def test_a_model_that_writes_nothing_is_told(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generative_replay, "end_ids_of", lambda *_: frozenset(range(1000)))
    with pytest.raises(SystemExit) as stop:
        call(
            "--model",
            tiny_model,
            "--tokens",
            "50",
            "--document-tokens",
            9,
            "--batch",
            2,
            "--out",
            tmp_path / "own.jsonl",
        )
    assert stop.value.code == 2
    assert "of 8 documents none can be used (8 x empty)" in capsys.readouterr().err
    assert not (tmp_path / "own.jsonl").exists()
