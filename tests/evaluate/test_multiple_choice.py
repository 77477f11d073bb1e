"""Multiple choice against transformers, question by question, and what must hold whatever the model."""

import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from inputs import chinese, english, random_weights, tiny_config, write_sentencepiece, write_tokenizer

from cpt_jax.cli import main
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.evaluate.multiple_choice import (
    Outcomes,
    Question,
    answer_questions,
    difference,
    outcomes,
    read_questions,
    token_pairs,
)
from cpt_jax.evaluate.token_scores import TokenPair, score_continuations
from cpt_jax.models.decoder import abstract_decoder, apply, logits
from cpt_jax.recipe.model import load_model
from cpt_jax.vocab.tokenizer import Tokenizer

FLOAT32 = Precision(compute="float32")


def questions(count: int) -> list[Question]:
    """Of very different lengths, some longer than the tiny model's context of 256 tokens; two to four choices."""
    texts, answers = english(count * 4, seed=1), [text[:30] for text in english(count * 4, seed=2)]
    made = []
    for index in range(count):
        question = " ".join(texts[index : index + (12 if index % 7 == 0 else 1)])
        choices = tuple(answers[4 * index : 4 * index + 2 + index % 3])
        made.append(Question(question=question, choices=choices, answer=index % len(choices)))
    return made


def write(path, records):
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return path


def reference(directory, pairs: list[TokenPair]) -> list[tuple[float, bool]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found = []
    for pair in pairs:
        ids = (pair.context + pair.continuation)[-257:]
        with torch.no_grad():
            values = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
        values, wanted = values[-len(pair.continuation) :], torch.tensor(pair.continuation)
        total = values.gather(1, wanted[:, None]).sum().item()
        found.append((total, bool((values.argmax(-1) == wanted).all())))
    return found


def test_log_likelihoods_and_accuracies_are_those_of_transformers(tiny_model):
    tokenizer, model = Tokenizer(tiny_model), load_model(tiny_model)
    asked = questions(15)
    pairs = token_pairs(tokenizer, [(question.question, text) for question in asked for text in question.choices])
    assert max(len(pair.context) for pair in pairs) > 256
    expected = reference(tiny_model, pairs)
    weights, options = model.on_device(FLOAT32), dict(batch_tokens=512, precision=FLOAT32)
    found = score_continuations(model.network, weights, pairs, max_length=256, **options)
    np.testing.assert_allclose([score.log_likelihood for score in found], [total for total, _ in expected], rtol=1e-4)
    assert [score.greedy for score in found] == [greedy for _, greedy in expected]
    done: list[int] = []
    result = answer_questions(tokenizer, model.network, weights, asked, **options, on_progress=done.append)
    assert sum(done) == len(pairs)
    values = iter(total for total, _ in expected)
    right = []
    for question in asked:
        totals = [next(values) for _ in question.choices]
        per_byte = [total / len(text.encode()) for total, text in zip(totals, question.choices, strict=True)]
        right.append([max(range(len(v)), key=v.__getitem__) == question.answer for v in (totals, per_byte)])
    assert np.array(right).T.tolist() == [result.correct.tolist(), result.correct_normalised.tolist()]
    assert 0 < result.accuracy < 1


def test_the_likeliest_tokens_are_greedy(tiny_model):
    """Several tokens of them, and no more so when one is exchanged."""
    model = load_model(tiny_model)
    weights, ids = model.on_device(FLOAT32), [3, 14, 15]
    for _ in range(4):
        shape = np.array([ids])
        hidden = apply(
            model.network, weights, shape, np.arange(len(ids))[None], np.ones_like(shape), compute_dtype="float32"
        )
        ids.append(int(logits(model.network, weights, hidden[0, -1], compute_dtype="float32").argmax()))
    likeliest = TokenPair(context=ids[:3], continuation=ids[3:])
    other = TokenPair(context=ids[:3], continuation=[*ids[3:-1], (ids[-1] + 1) % 320])
    scores = score_continuations(
        model.network, weights, [likeliest, other], max_length=256, batch_tokens=256, precision=FLOAT32
    )
    assert [score.greedy for score in scores] == [True, False]


@pytest.mark.parametrize("grown", [False, True])
def test_what_is_read_beside_it_changes_no_score(grown):
    """Alone or in a batch, with much or little padding; with new rows, and rows that are padding, as without."""
    config = tiny_config(**(dict(vocab_size=300, new_rows=20, row_multiple=8) if grown else {}))
    network, generator = abstract_decoder(config), np.random.default_rng(0)
    weights = jax.tree.map(jax.numpy.asarray, random_weights(config))
    # Some continuations are longer than a chunk of logits.
    sizes = [(int(a), int(b)) for a, b in generator.integers(1, (60, 150), (40, 2))]
    pairs = [
        TokenPair(context=generator.integers(0, 320, a).tolist(), continuation=generator.integers(0, 320, b).tolist())
        for a, b in sizes
    ]
    options = dict(max_length=200, precision=FLOAT32)
    alone = [score_continuations(network, weights, [pair], batch_tokens=1, **options)[0] for pair in pairs]
    for batch_tokens in (256, 2048):
        together = score_continuations(network, weights, pairs, batch_tokens=batch_tokens, **options)
        for one, other in zip(alone, together, strict=True):
            assert other.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-5)
            assert other.greedy == one.greedy


def test_few_shapes_are_compiled(monkeypatch, tiny_model):
    import cpt_jax.evaluate.token_scores as module

    shapes = set()

    def function(weights, rows, places, count):
        shapes.add((rows["inputs"].shape, places.shape))
        return np.zeros(rows["inputs"].size), np.zeros(rows["inputs"].size, bool)

    monkeypatch.setattr(module, "_score_function", lambda network, compute: function)
    pairs = [TokenPair(context=[1] * size, continuation=[2]) for size in range(1, 300)]
    network = load_model(tiny_model).network
    score_continuations(network, {}, pairs, max_length=200, batch_tokens=512, precision=FLOAT32)
    assert {shape for shape, _ in shapes} == {(16, 32), (8, 64), (4, 128), (2, 200)}
    assert len(shapes) == 4


def test_normalised_is_by_bytes_of_the_choice():
    """A long choice that is right is found by its likelihood per byte; characters of three bytes count three."""
    long = Question(question="", choices=("yes", "certainly so"), answer=1)
    result = outcomes([long], [-6.0, -12.0])
    assert (result.accuracy, result.accuracy_normalised) == (0.0, 1.0)
    # Per character it would be the first: -6 / 2 against -7 / 2; per byte, -6 / 2 against -7 / 6.
    wide = Question(question="", choices=("ab", "规定"), answer=1)
    result = outcomes([wide], [-6.0, -7.0])
    assert (result.accuracy, result.accuracy_normalised) == (0.0, 1.0)
    # Of equal ones, the first.
    result = outcomes([Question(question="", choices=("a", "b"), answer=0)], [-1.0, -1.0])
    assert (result.accuracy, result.accuracy_normalised, len(result)) == (1.0, 1.0, 1)


def test_standard_errors():
    """Of a share, by the sample's deviation; of a difference, by questions that the two answer differently."""
    right = np.arange(40) < 21
    result = Outcomes(right, right)
    assert result.standard_error == pytest.approx(math.sqrt(0.525 * 0.475 / 39))
    assert difference(result, result) == (0.0, 0.0)
    change, error = difference(result, Outcomes(np.arange(40) < 25, right))
    assert change == pytest.approx(0.1)
    assert error == pytest.approx(math.sqrt(0.1 * 0.9 / 39))
    assert Outcomes(right[:1], right[:1]).standard_error == 0.0


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "sentencepiece"])
def test_question_and_answer_are_the_tokens_of_one_text(tmp_path, kind):
    if kind == "sentencepiece":
        write_sentencepiece(tmp_path, english(300), "bpe", 400)
        settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        write_tokenizer(tmp_path, english(300), kind=kind)
    tokenizer = Tokenizer(tmp_path)
    texts = [
        ("the city was", "built"),
        ("the city was ", "built"),
        ("the city was\n", "old"),
        ("the city was", " old house"),
    ]
    joined = ["the city was built", "the city was  built", "the city was\n old", "the city was old house"]
    context = tokenizer.encode("the city was")
    front = [tokenizer.start_id] if tokenizer.backend.encode("a").ids[0] == tokenizer.start_id else []
    for pair, whole in zip(token_pairs(tokenizer, texts), joined, strict=True):
        assert pair.context == front + context
        assert pair.context + pair.continuation == front + tokenizer.encode(whole)
    # Without a question, the answer stands at the beginning of a document, behind the space all the same.
    (pair,) = token_pairs(tokenizer, [("", "the old house")])
    assert (pair.context, pair.continuation) == ([tokenizer.start_id], tokenizer.encode(" the old house"))
    # An answer that the tokenizer joins with the question has a token all the same.
    for question, answer in zip(english(50, seed=3), chinese(50, seed=3), strict=True):
        (pair,) = token_pairs(tokenizer, [(question[:-1], answer[:1])])
        assert pair.continuation


GOOD = {"question": "the city", "choices": ["old", "water"], "answer": 1}
WRONG = {
    "no question": ({"choices": ["a", "b"], "answer": 0}, "it has 'choices', 'answer': give one field 'question'"),
    "two questions": (GOOD | {"query": "x"}, "it has 'question' and 'query': give one field 'question'"),
    "no number": (GOOD | {"answer": "B"}, "the answer is 'B': give the number of the right choice, from 0"),
    "true": (GOOD | {"answer": True}, "the answer is True: give the number"),
    "too large": (GOOD | {"answer": 2}, "the answer is 2: give 0 to 1"),
    "from the end": (GOOD | {"answer": -1}, "the answer is -1: give 0 to 1"),
    "one choice": (GOOD | {"choices": ["a"], "answer": 0}, "give at least two texts"),
    "an empty choice": (GOOD | {"choices": ["a", " "]}, "none of them empty"),
    "choices as text": (GOOD | {"choices": "ab"}, "the choices are 'ab': give a list of texts"),
    "a list": ([1], "it is no record"),
    "half a pair": (GOOD | {"question": "the \ud800"}, "'the \\ud800' holds half a UTF-16 pair"),
    "half a pair in a choice": (GOOD | {"choices": ["a", "\udfff"]}, "'\\udfff' holds half a UTF-16 pair"),
}


@pytest.mark.parametrize(("record", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_record_is_told_by_file_and_line(tmp_path, record, message):
    path = write(tmp_path / "q.jsonl", [GOOD, record])
    with pytest.raises(UserError) as told:
        read_questions(path)
    assert str(told.value).startswith(f"{path}, line 2: ")
    assert message in str(told.value)


def test_what_is_no_text_is_told_and_synonyms_are_read(tmp_path):
    path = tmp_path / "q.jsonl"
    with pytest.raises(UserError, match="there is no such file"):
        read_questions(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no question"):
        read_questions(path)
    for line in (b"{", b'{"question": "\xff"}'):
        path.write_bytes(line)
        with pytest.raises(UserError, match="line 1: it is no JSON"):
            read_questions(path)
    write(path, [{"query": "a", "choices": ["b", "c"], "gold": 1}])
    read = read_questions(path)
    assert read == [Question(question="a", choices=("b", "c"), answer=1)]
    # The mark that some editors put in front is nothing.
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_questions(path) == read


def test_a_token_that_the_question_s_end_and_the_answer_share_is_the_answer_s():
    first = SimpleNamespace(ids=[7, 5], special_tokens_mask=[1, 0])
    ids = {"2": [20], "2 3": [23], "1 2": [10, 20], "1 2 3": [10, 23]}
    tokenizer = SimpleNamespace(
        backend=SimpleNamespace(encode=lambda _: first), encode_documents=lambda texts: [ids[text] for text in texts]
    )
    alone, behind = token_pairs(tokenizer, [("2", "3"), ("1 2", "3")])  # type: ignore[arg-type]
    assert (alone.context, alone.continuation) == ([7], [23])
    assert (behind.context, behind.continuation) == ([7, 10], [23])


def test_an_answer_longer_than_the_context_is_told(tiny_model):
    model = load_model(tiny_model)
    asked = [Question(question="the", choices=("old " * 300, "city"), answer=0)]
    with pytest.raises(UserError, match="tokens and the model reads 256"):
        answer_questions(
            Tokenizer(tiny_model), model.network, model.on_device(FLOAT32), asked, batch_tokens=512, precision=FLOAT32
        )
    longer = TokenPair(context=[3], continuation=[4] * 257)
    with pytest.raises(UserError, match="an answer has 257 tokens and the model reads 256"):
        score_continuations(model.network, {}, [longer], max_length=256, batch_tokens=512, precision=FLOAT32)


def test_the_command(tmp_path, tiny_model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    records = [{"question": q.question, "choices": q.choices, "answer": q.answer} for q in questions(12)]
    write(tmp_path / "q.jsonl", records)
    write(tmp_path / "en.jsonl", [{"text": text} for text in english(5)])
    common = ["eval", "--model", str(tiny_model)]
    main([*common, "--choices", "quiz=q.jsonl", "--json", "one.json"])
    written = json.loads((tmp_path / "one.json").read_text())
    assert written["results"] == []
    (entry,) = written["choices"]
    assert {"name": "quiz", "questions": 12}.items() <= entry.items()
    out = capsys.readouterr().out
    assert f"{entry['accuracy']:.1%} ± {entry['standard_error']:.1%}" in out
    again = str(tiny_model) + "/."
    main([*common, "--against", again, "--data", "en=en.jsonl", "--choices", "quiz=q.jsonl", "--json", "two.json"])
    written = json.loads((tmp_path / "two.json").read_text())
    assert [entry["model"] for entry in written["choices"]] == [again, str(tiny_model)]
    assert written["differences"] == [
        {"name": "quiz", "accuracy": 0.0, "accuracy_normalised": 0.0, "standard_error": 0.0}
    ]
    assert len(written["results"]) == 2
    assert "difference" in capsys.readouterr().out
    for arguments, message in (
        ([], "nothing to evaluate: give --data NAME=SPEC or --choices NAME=FILE.jsonl"),
        (["--choices", "quiz=no.jsonl"], "no.jsonl: there is no such file"),
        (["--choices", "quiz=q.jsonl", "quiz=q.jsonl"], "--choices quiz=... is given twice"),
        (["--choices", "quiz=q.jsonl", "--against", str(tiny_model)], "is the model itself: give another one"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*common, *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
