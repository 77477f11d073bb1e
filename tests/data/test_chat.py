"""Which tokens of a conversation are learnt: against transformers' own mask, and against one made by hand."""

import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import english, write_tokenizer

from cpt_jax.core.errors import UserError
from cpt_jax.data.chat import ChatEncoder, _overlapping
from cpt_jax.data.chat_template import ChatTemplate
from cpt_jax.data.pipeline import prepare_corpus
from cpt_jax.data.prepare import NOT_LEARNT, STATISTICS
from cpt_jax.data.sources import Corpus, Document, SkipCounts
from cpt_jax.data.steps import Task
from cpt_jax.vocab.tokenizer import Tokenizer

# Each says with {% generation %} what is to be learnt; without these tags the same has to be found.
TEMPLATES = {
    "header": """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "no prompt": """{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}""",
    "prompt always": """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' }}{% if m.role == 'assistant' %}{% generation %}{{ (m.content | trim) + '<|im_end|>' }}{% endgeneration %}{% else %}{{ (m.content | trim) + '<|im_end|>' }}{% endif %}{% endfor %}{{ '<|im_start|>assistant\n\n' }}""",
    "thought of the last": """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
}
CONVERSATIONS = {
    "one turn": [("user", "the city?"), ("assistant", "the old city.")],
    "several turns": [("user", "the"), ("assistant", "river"), ("user", "and"), ("assistant", "river")],
    "system": [("system", "the state was"), ("user", "a"), ("assistant", "b")],
    "chinese": [("user", "你好，国务院。"), ("assistant", "应当依照本法 🙂 规定。")],
    "empty": [("user", "say nothing"), ("assistant", ""), ("user", ""), ("assistant", "x")],
    "spaces": [("user", " a "), ("assistant", "  b \n"), ("user", "c\n"), ("assistant", "\n\nd")],
    "quotes the question": [("user", "assistant\nthe"), ("assistant", "assistant\nthe")],
    "added token": [("user", "why"), ("assistant", "<think>water</think> year")],
    "ends with a question": [("user", "a"), ("assistant", "b"), ("user", "c")],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("chat") / "tokenizer"
    write_tokenizer(out, english(300), kind="qwen")
    return out


def messages(conversation) -> list[dict]:
    return [{"role": role, "content": content} for role, content in conversation]


def with_template(directory, template: str, out):
    shutil.copytree(directory, out, dirs_exist_ok=True)
    (out / "chat_template.jinja").write_text(template)
    return Tokenizer(out)


def without_tags(template: str) -> str:
    return re.sub(r"\{% (end)?generation %\}", "", template)


def encoder_of(tokenizer) -> ChatEncoder:
    return ChatEncoder(tokenizer, ChatTemplate(tokenizer))


def encoded(encoder: ChatEncoder, conversation: list[dict]) -> tuple[list[int], list[int]]:
    """Ids and mask, as transformers gives them."""
    renderings = list(encoder.rendered([Document("", "", tuple(conversation))], SkipCounts()))
    [record] = encoder.encode_documents(renderings)
    return (record & (NOT_LEARNT - 1)).tolist(), (record < NOT_LEARNT).astype(int).tolist()


def reference(directory, conversation: list[dict]) -> tuple[list[int], list[int]]:
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(directory)
    found = reader.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_mask_is_that_of_transformers(directory, tmp_path, template):
    tagged = with_template(directory, template, tmp_path / "tagged")
    plain = with_template(directory, without_tags(template), tmp_path / "plain")
    told, found = encoder_of(tagged), encoder_of(plain)
    for name, conversation in CONVERSATIONS.items():
        expected = reference(tagged.directory, messages(conversation))
        assert encoded(told, messages(conversation)) == expected, name
        assert encoded(found, messages(conversation)) == expected, name
        assert any(expected[1])


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


@given(contents=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_answers_are_found_whatever_they_say(directory, tmp_path_factory, contents):
    """Everything learnt lies in an answer or its end, every answer is learnt whole, and nothing else ever is."""
    tokenizer = with_template(directory, without_tags(TEMPLATES["header"]), tmp_path_factory.getbasetemp() / "any")
    conversation = [turn for asked, answer in contents for turn in (("user", asked), ("assistant", answer))]
    encoder = encoder_of(tokenizer)
    [rendering] = encoder.rendered([Document("", "", tuple(messages(conversation)))], SkipCounts())
    answers = [rendering.text[response.start : response.end] for response in rendering.responses]
    assert answers == [answer + "<|im_end|>" for _, answer in contents]
    _, learnt = encoded(encoder, messages(conversation))
    [written] = tokenizer.encode_marked([rendering.text])
    for (first, last), mark in zip(written.offsets, learnt, strict=True):
        touched = any(first < response.end and last > response.start for response in rendering.responses)
        assert mark == touched
    [chat] = encoder.measured([rendering])
    assert chat.bytes == sum(len(answer.encode()) for _, answer in contents)
    assert (chat.counted <= np.asarray(learnt, bool)).all()
    assert sum(learnt) - chat.counted.sum() == len(contents), "the end of each turn is learnt and not measured"


@pytest.mark.parametrize("space", [" ", "\\n"], ids=["space", "line"])
def test_the_end_of_a_turn_is_learnt_where_the_template_writes_white_space_of_its_own_before_it(
    directory, tmp_path, space
):
    """As Llama 2's does; whatever the answer ends with."""
    template = """{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + 'SPACE<|im_end|>' }}{% endif %}{% endfor %}"""
    encoder = encoder_of(with_template(directory, template.replace("SPACE", space), tmp_path))
    for answer in ("the old city", "the old city ", "the old city \n", " the old city\n"):
        conversation = Document("", "", tuple(messages([("user", "which?"), ("assistant", answer)])))
        [rendering] = encoder.rendered([conversation], SkipCounts())
        [response] = rendering.responses
        assert rendering.text[response.start : response.content_end].strip() == "the old city"
        assert rendering.text[response.start : response.end].endswith(
            "the old city" + space.replace("\\n", "\n") + "<|im_end|>"
        )


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_an_answer_of_weight_0_is_not_learnt(directory, tmp_path, template):
    encoder = encoder_of(with_template(directory, template, tmp_path))
    conversation = messages(CONVERSATIONS["several turns"])
    _, both = encoded(encoder, conversation)
    conversation[1]["weight"] = 0
    _, second = encoded(encoder, conversation)
    runs = np.flatnonzero(np.diff([0, *both]) == 1)
    assert len(runs) == 2
    assert second[: runs[1]] == [0] * runs[1]
    assert second[runs[1] :] == both[runs[1] :]


HEADER = without_tags(TEMPLATES["header"])
ALTERNATE = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('Begin with a user, not ' + messages[0].role) }}{% endif %}"
    + HEADER
)
SKIPPED = {
    "roles out of order": (ALTERNATE, "system", "chat template: Begin with a user, not system"),
    "special token": (HEADER, "special", "the special token <|im_end|> within a message"),
    "all of weight 0": (HEADER, "weightless", "nothing of an assistant to learn"),
    "words for nothing": (HEADER.replace("m.content", "(m.content or 'no')"), "empty", "changes an answer's text"),
    "first answer left out": (
        "{% for m in messages %}{% if not (loop.first and m.role == 'assistant') %}"
        "{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endif %}{% endfor %}",
        "greeting",
        "leaves out an answer",
    ),
    "greeting": (HEADER.replace("{% for", "{{ messages[0].role }}{% for"), "greeting", "the assistant speaks first"),
}  # fmt: skip
ODD = {
    "special": messages([("user", "a"), ("assistant", "b <|im_end|> c")]),
    "weightless": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}],
    "greeting": messages([("assistant", "hello"), ("user", "a"), ("assistant", "b")]),
}


@pytest.mark.parametrize(("template", "name", "reason"), SKIPPED.values(), ids=SKIPPED)
def test_what_cannot_be_used_is_skipped_and_counted(directory, tmp_path, template, name, reason):
    tokenizer = with_template(directory, template, tmp_path)
    odd = ODD[name] if name in ODD else messages(CONVERSATIONS[name])
    good = messages([("user", "A"), ("assistant", "B")])
    skipped = SkipCounts()
    documents = [Document("", "", tuple(conversation)) for conversation in (good, odd, good, odd)]
    assert len(list(encoder_of(tokenizer).rendered(documents, skipped))) == 2
    [(found, count)] = skipped.items()
    assert reason in found
    assert count == 2


def test_what_the_template_cannot_write_is_shown(directory, tmp_path):
    with_template(directory, SKIPPED["greeting"][0], tmp_path / "tokenizer")
    lines = [{"messages": each} for each in (ODD["greeting"], messages(CONVERSATIONS["one turn"]))]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = Corpus(name="talk", spec=str(tmp_path / "talk.jsonl"), format="chat")
    task = Task(corpus=corpus, place=tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    [(reason, count)] = prepare_corpus(task).skipped.items()
    left_out = json.loads((tmp_path / "out" / STATISTICS).read_text())["left_out"]
    assert (reason, count) == ("the assistant speaks first, and the chat template writes no prompt for that", 1)
    [[_, text]] = left_out[reason]
    assert "hello" in text


def test_what_is_learnt_of_conversations_is_counted(directory, tmp_path):
    tokenizer = with_template(directory, TEMPLATES["header"], tmp_path / "tokenizer")
    lines = [{"messages": messages(conversation)} for conversation in CONVERSATIONS.values()]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = Corpus(name="talk", spec=str(tmp_path / "talk.jsonl"), format="chat")
    manifest = prepare_corpus(Task(corpus=corpus, place=tmp_path / "out", tokenizer=tokenizer.directory), 1)
    masks = [reference(tokenizer.directory, line["messages"])[1] for line in lines]
    assert manifest.trained_tokens == sum(map(sum, masks)) < manifest.tokens == sum(map(len, masks))
    assert f"{manifest.tokens:,} tokens ({manifest.trained_tokens:,} of them learnt)" in manifest.told()


REFUSED = {
    "no Jinja": ("{% for m in messages %}", "cannot be used .* give another"),
    "no end of turn": ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", "eos_token }}"),
    "leaves answers out": ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves out"),
    "refuses answers": (
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
        r"cannot write a question and its answer \(no\)",
    ),
}


@pytest.mark.parametrize(("template", "message"), REFUSED.values(), ids=REFUSED)
def test_a_template_that_teaches_nothing_is_refused(directory, tmp_path, template, message):
    tokenizer = with_template(directory, template, tmp_path)
    with pytest.raises(UserError, match=message):
        encoder_of(tokenizer)


def test_a_tokenizer_without_a_template_needs_a_file(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "base")
    config = tmp_path / "base" / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    tokenizer = Tokenizer(tmp_path / "base")
    with pytest.raises(UserError, match=r"no chat template: give a Jinja file \(--chat-template FILE\)"):
        ChatTemplate(tokenizer)
    with pytest.raises(UserError, match=r"no.jinja cannot be read"):
        ChatTemplate(tokenizer, tmp_path / "no.jinja")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    text = ChatTemplate(tokenizer, tmp_path / "t.jinja").render(messages([("user", "a")]))
    assert text == "a<|endoftext|>"
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert Tokenizer(tmp_path / "base").chat_template == "d"


def test_special_tokens_are_themselves_in_a_marked_text_only(directory):
    tokenizer = Tokenizer(directory)
    marked = tokenizer.backend.token_to_id("<|im_end|>")
    text = "the city<|im_end|> <think>"
    [written] = tokenizer.encode_marked([text])
    plain = tokenizer.encode(text)
    assert marked in written.ids
    assert marked not in plain
    assert tokenizer.decode(plain) == tokenizer.decode(written.ids) == text


@pytest.mark.slow
def test_the_real_template_of_smollm2_by_hand(smollm2):
    """Its pieces put together by hand: special tokens by number, text between them alone."""
    tokenizer = Tokenizer(smollm2)
    encoder = encoder_of(tokenizer)
    begin, end = (tokenizer.backend.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    default = ("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")
    for name in ("one turn", "several turns", "system", "chinese", "empty", "added token", "ends with a question"):
        conversation = CONVERSATIONS[name]
        ids, mask = [], []
        for role, content in [*([] if conversation[0][0] == "system" else [default]), *conversation]:
            header, text = [begin, *tokenizer.encode(f"{role}\n")], tokenizer.encode(content)
            learnt = int(role == "assistant")
            ids += [*header, *text, end, *tokenizer.encode("\n")]
            mask += [0] * len(header) + [learnt] * (len(text) + 1) + [0]
        assert encoded(encoder, messages(conversation)) == (ids, mask), name


def test_a_token_without_characters_stands_for_the_next():
    offsets, spans = [(0, 0), (0, 2), (2, 2), (2, 4), (4, 6), (6, 6)], [(2, 4)]
    assert _overlapping(offsets, spans, 6).tolist() == [False, False, True, True, False, False]
