"""Instruction data in its usual formats."""

import json

import pytest

from cpt_jax.core.errors import UserError
from cpt_jax.data.conversations import Unusable, conversation_of, plain_text
from cpt_jax.data.holdout import Holdout, heldout_documents, learnable_documents, write_heldout
from cpt_jax.data.sources import Corpus, SkipCounts, named_corpora, read

EXPECTED = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
SYSTEM = {"role": "system", "content": "Be brief."}
FORMATS = {
    "messages": {"messages": EXPECTED, "text": "ignored"},
    "sharegpt": {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
    "completion": {"prompt": "1+1?", "completion": "2"},
    "messages in both": {"prompt": EXPECTED[:1], "completion": EXPECTED[1:]},
    "alpaca": {"instruction": "1+1?", "input": "", "output": "2"},
    "tfds": {"messages": {"role": [b"user", b"assistant"], "content": [b"1+1?", b"2"]}},
}
WRONG = {
    "text": ({"text": "a"}, "no conversation"),
    "no list": ({"messages": "hello"}, "no list of messages"),
    "nobody answers": ({"messages": EXPECTED[:1]}, "no assistant's message"),
    "empty": ({"messages": []}, "no assistant's message"),
    "no role": ({"messages": [{"content": "a"}]}, "without a role or a text"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "without a role or a text"),
    "no object": ({"messages": ["a"]}, "a message that is no object"),
    "tools": ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "tool calls"),
    "one message": ({"messages": EXPECTED[1]}, "no list of messages"),
    "no turns": ({"messages": {"role": 1, "content": 2}}, "no list of messages"),
    "a number": ({"instruction": 5, "input": "x", "output": "a"}, "an instruction that is no text"),
    "nothing": ({"prompt": None, "completion": "a"}, "no list of messages"),
}


@pytest.mark.parametrize("record", FORMATS.values(), ids=FORMATS)
def test_every_format_is_the_same_conversation(record):
    assert conversation_of(record) == EXPECTED
    if "messages" not in record:
        assert conversation_of(record | {"system": "Be brief."}) == [SYSTEM, *EXPECTED]


def test_an_input_stands_below_its_instruction():
    messages = conversation_of({"instruction": "Translate", "input": "Haus", "output": "house"})
    assert messages[0]["content"] == "Translate\n\nHaus"
    assert plain_text(messages) == "Translate\n\nHaus\n\nhouse"


@pytest.mark.parametrize(("record", "reason"), WRONG.values(), ids=WRONG)
def test_what_is_none_has_its_reason(record, reason):
    with pytest.raises(Unusable, match=reason):
        conversation_of(record)


def records(count: int) -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
        for i in range(count)
    ]


def write(path, lines: list[dict]):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_parquet_and_lines_hold_the_same_conversations(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    lines = write(tmp_path / "a.jsonl", records(5))
    pyarrow.parquet.write_table(pa.Table.from_pylist(records(5)), tmp_path / "a.parquet")
    first, second = (
        list(read(Corpus(name="c", spec=str(path), format="chat"), SkipCounts()))
        for path in (lines, tmp_path / "a.parquet")
    )
    assert first == second
    assert [list(document.messages) for document in first] == [record["messages"] for record in records(5)]
    with pytest.raises(UserError, match=r"no column 'text' but a conversation: give --chat c, .* it has: messages"):
        list(read(Corpus(name="c", spec=str(tmp_path / "a.parquet")), SkipCounts()))
    pyarrow.parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(UserError, match=r"has no conversation .* its columns: text"):
        list(read(Corpus(name="c", spec=str(tmp_path / "text.parquet"), format="chat"), SkipCounts()))


def test_a_format_mistaken_for_another_is_told(tmp_path):
    chat = write(tmp_path / "chat.jsonl", records(3))
    with pytest.raises(UserError, match="3 x no text field 'text' but a conversation: give --chat c, or format="):
        list(read(Corpus(name="c", spec=str(chat)), SkipCounts()))
    text = write(tmp_path / "text.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match="1 x no conversation"):
        list(read(Corpus(name="c", spec=str(text), format="chat"), SkipCounts()))
    with pytest.raises(UserError, match="--chat names 'x', but the corpora are c"):
        named_corpora([("c", str(chat))], "text", ["x"])


def test_held_out_conversations_come_back_and_are_not_learnt(tmp_path):
    lines = records(60)
    lines[3]["messages"][1]["weight"] = 0
    lines[4]["messages"][1]["content"] = "two\u2028lines\nof text"
    corpus = Corpus(name="c", spec=str(write(tmp_path / "a.jsonl", lines)), format="chat")
    holdout = Holdout(share=0.5)
    write_heldout(corpus, holdout, tmp_path)
    heldout = [list(document.messages) for document in heldout_documents(tmp_path)]
    learnt = [list(document.messages) for document in learnable_documents(corpus, holdout, tmp_path, SkipCounts())]
    assert 10 < len(heldout) < 50
    assert sorted(map(str, heldout + learnt)) == sorted(str(line["messages"]) for line in lines)
