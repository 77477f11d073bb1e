"""The harness's own "hf" model and ours, on the same directory and tasks: log-likelihoods, texts and metrics agree."""

import json

import numpy as np
import pytest
from inputs import english, write_jsonl

from cpt_jax.cli import main
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import FLOAT32
from cpt_jax.evaluate.multiple_choice import read_questions, token_pairs
from cpt_jax.evaluate.token_scores import score_continuations
from cpt_jax.recipe.model import load_model
from cpt_jax.vocab.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason="needs lm_eval, an optional dependency: pip install lm_eval")
# What other libraries deprecate in one another.
pytestmark = pytest.mark.filterwarnings("ignore")

TASKS = {
    "tiny_choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
""",
    # Without a question, as BLiMP is.
    "tiny_pairs": """
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
""",
    "tiny_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
""",
    "tiny_next": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: " the"
generation_kwargs: {until: [" river"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory of tasks on local files, which nothing is fetched for."""
    root = tmp_path_factory.mktemp("tasks")
    texts, answers = english(36, seed=1), [text[:25] for text in english(36, seed=2)]
    questions = [
        {"question": texts[i] + " " * (i % 2), "choices": answers[3 * i : 3 * i + 3], "answer": i % 3}
        for i in range(12)
    ]
    # One that is longer than the tiny model's context, and loses its beginning.
    questions[0]["question"] = " ".join(texts)
    path = root / "tiny_choices.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    pairs = [{"question": "", "choices": texts[2 * i : 2 * i + 2], "answer": i % 2} for i in range(18)]
    (root / "tiny_pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    # One is read in windows.
    write_jsonl(root / "tiny_text.jsonl", [*texts[:4], " ".join(texts)])
    write_jsonl(root / "tiny_next.jsonl", texts[:6])
    for name, task in TASKS.items():
        data = json.dumps({"data_files": {"test": str(root / f"{name}.jsonl")}})
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {data}\ntest_split: test"
        (root / f"{name}.yaml").write_text(head + task)
    return root


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


def evaluate(model: str, directory, tasks, **arguments) -> dict:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import cpt_jax.recipe.lm_eval_model  # noqa: F401

    found = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(directory)} | arguments,
        tasks=list(TASKS),
        batch_size=2,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found is not None
    return found


@pytest.fixture(scope="module")
def theirs(tiny_model, tasks):
    return evaluate("hf", tiny_model, tasks, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def ours(tiny_model, tasks):
    return evaluate("cpt_jax", tiny_model, tasks)


def responses(found: dict, task: str) -> list:
    return [sample["filtered_resps"] for sample in sorted(found["samples"][task], key=lambda s: s["doc_id"])]


def test_log_likelihoods_are_those_of_the_hf_model(ours, theirs):
    mine, other = (
        [answer for sample in responses(found, "tiny_choices") for answer in sample] for found in (ours, theirs)
    )
    assert len(mine) == 36
    np.testing.assert_allclose([value for value, _ in mine], [value for value, _ in other], atol=1e-3)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]
    mine, other = (np.array(responses(found, "tiny_text"), float) for found in (ours, theirs))
    np.testing.assert_allclose(mine, other, rtol=1e-5)


def test_generated_texts_are_those_of_the_hf_model(ours, theirs):
    assert responses(ours, "tiny_next") == responses(theirs, "tiny_next")
    assert any(text for (text,) in responses(ours, "tiny_next"))


def test_metrics_are_equal(ours, theirs):
    for task in TASKS:
        mine, other = (
            {name: value for name, value in found["results"][task].items() if isinstance(value, float)}
            for found in (ours, theirs)
        )
        assert mine
        assert mine == pytest.approx(other, rel=1e-5, nan_ok=True)


def test_our_own_command_has_the_same_accuracies(ours, tiny_model, tasks, tmp_path):
    """`acc` and `acc_bytes` are `cpt eval`'s two, question by question cut in the same way."""
    from lm_eval.api.metrics import mean_stderr

    out = tmp_path / "e.json"
    main(["eval", "--model", str(tiny_model), "--choices", f"q={tasks / 'tiny_choices.jsonl'}", "--json", str(out)])
    (entry,) = json.loads(out.read_text())["choices"]
    asked = read_questions(tasks / "tiny_pairs.jsonl")
    texts = [("", choice) for question in asked for choice in question.choices]
    model = load_model(tiny_model)
    scores = score_continuations(
        model.network,
        model.on_device(FLOAT32),
        token_pairs(Tokenizer(tiny_model), texts),
        max_length=256,
        batch_tokens=1024,
        precision=FLOAT32,
    )
    expected = [value for sample in responses(ours, "tiny_pairs") for value, _ in sample]
    np.testing.assert_allclose([score.log_likelihood for score in scores], expected, atol=1e-3)
    harness = ours["results"]["tiny_choices"]
    assert entry["accuracy"] == harness["acc,none"]
    assert entry["accuracy_normalised"] == harness["acc_bytes,none"]
    answers = [sample["acc"] for sample in ours["samples"]["tiny_choices"]]
    assert entry["standard_error"] == pytest.approx(mean_stderr(answers))


def test_pairs_are_cut_as_the_harness_cuts_them(tiny_model):
    """Its delimiter is a space, or none where choices begin with white space."""
    from cpt_jax.recipe.lm_eval_model import HarnessModel

    model = HarnessModel(str(tiny_model))
    ends, answers = ("", " ", "\n", " \n", "\u00a0", "\t\t"), ("built", " old house", "\nriver", "B")
    asked = [(f"the city was{end}", answer) for end in ends for answer in answers]
    expected = [model._encode_pair(text, answer if answer[0].isspace() else f" {answer}") for text, answer in asked]
    found = [(pair.context, pair.continuation) for pair in token_pairs(Tokenizer(tiny_model), asked)]
    assert found == expected


def test_the_harness_s_own_command_knows_the_model(tiny_model, tasks, capsys):
    arguments = f"pretrained={tiny_model},max_length=128"
    rest = ["--include_path", str(tasks), "--batch_size", "4", "--limit", "5"]
    main(["lm-eval", "--model", "cpt_jax", "--model_args", arguments, "--tasks", "tiny_choices", *rest])
    assert "acc_norm" in capsys.readouterr().out


def test_nothing_is_generated_behind_a_stop_sequence(tiny_model):
    from types import SimpleNamespace

    from cpt_jax.recipe.lm_eval_model import HarnessModel

    def answer(*until: str) -> str:
        request = SimpleNamespace(args=("the city", {"until": list(until), "max_gen_toks": 40}))
        return model.generate_until([request])[0]  # type: ignore[list-item]

    model = HarnessModel(str(tiny_model))
    whole, prompt = answer(), model.tok_encode("the city")
    stop = whole[8:10]
    before = whole[: whole.index(stop)]
    assert answer(stop) == before
    produced = model._continuation(prompt, 40, [stop])
    assert len(produced) < len(model._continuation(prompt, 40, [])) == 40
    assert stop in model.tokenizer.decode(produced)
    assert stop not in model.tokenizer.decode(produced[:-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "batch_size is 'auto': give a number of sequences from 1"),
        ({"dtype": "int8"}, "dtype is 'int8': give float32 or bfloat16"),
        ({"max_length": 257}, "max_length is 257: give 1 to 256"),
    ],
)
def test_wrong_arguments_are_told(tiny_model, arguments, message):
    from cpt_jax.recipe.lm_eval_model import HarnessModel

    with pytest.raises(UserError) as told:
        HarnessModel(str(tiny_model), **arguments)
    assert message in str(told.value)


def test_a_chat_and_what_cannot_be_generated(tiny_model, tmp_path):
    import shutil
    from types import SimpleNamespace

    from cpt_jax.recipe.lm_eval_model import HarnessModel

    place = tmp_path / "model"
    shutil.copytree(tiny_model, place)
    (place / "chat_template.jinja").write_text("{% for m in messages %}<|endoftext|>{{ m.content }}{% endfor %}")
    model = HarnessModel(str(place))
    assert "m.content" in (model.chat_template(True) or "")
    text = model.apply_chat_template([{"role": "user", "content": "the city"}])
    assert text == "<|endoftext|>the city"
    for settings, message in (
        ({"do_sample": True, "temperature": 1.0, "max_gen_toks": 4}, "do_sample is true"),
        ({"until": ["."]}, "max_gen_toks is 256 and the model reads 256 tokens: give --gen_kwargs max_gen_toks=128"),
    ):
        request = SimpleNamespace(args=("the city", settings))
        with pytest.raises(UserError, match=message):
            model.generate_until([request])  # type: ignore[list-item]
