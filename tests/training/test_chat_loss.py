"""The loss of conversations in packed batches is torch's, of each alone, with labels -100 on all but the answers."""

import json
import shutil

import jax
import numpy as np
import pytest
from inputs import chinese, english, hf_config, random_weights, tiny_config, write_tokenizer

from cpt_jax.adapt import Full
from cpt_jax.checkpoint.hf_write import save
from cpt_jax.core.precision import Precision
from cpt_jax.data.loader import Loader
from cpt_jax.data.pipeline import prepare_corpus
from cpt_jax.data.sources import Corpus
from cpt_jax.data.steps import Task
from cpt_jax.recipe.model import load_model
from cpt_jax.training.loss import make_loss
from cpt_jax.vocab.tokenizer import Tokenizer

# {% generation %} makes transformers' own mask the reference; without it the same has to be found.
TAGGED = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    write_tokenizer(root / "tokenizer", english(300), kind="qwen")
    config = tiny_config()
    save(root / "model", config, random_weights(config), hf_config(config), root / "tokenizer")
    template = TAGGED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (root / "model" / "chat_template.jinja").write_text(template)
    return root / "model"


def conversations() -> list[list[dict]]:
    talks = []
    for number, (asked, answer) in enumerate(zip(english(12, seed=1), chinese(12, seed=2), strict=True)):
        turns = [("system", "the state")] * (number % 2) + [("user", asked), ("assistant", answer[:12])] * (
            1 + number % 2
        )
        talks.append([{"role": role, "content": content[:60]} for role, content in turns])
    return talks


def torch_losses(directory, talks: list[list[dict]], tagged) -> tuple[list[float], int]:
    """The sum of each conversation's losses, and the tokens that have one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(directory, tagged)
    (tagged / "chat_template.jinja").write_text(TAGGED)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    reader, loss = AutoTokenizer.from_pretrained(tagged), torch.nn.CrossEntropyLoss(reduction="sum")
    losses, count = [], 0
    for talk in talks:
        written = reader.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        ids = torch.tensor([written["input_ids"]])
        labels = torch.where(torch.tensor([written["assistant_masks"]]) == 1, ids, -100)
        with torch.no_grad():
            losses.append(loss(reference(ids).logits[0, :-1], labels[0, 1:]).item())
        count += int((labels[0, 1:] != -100).sum())
    return losses, count


def test_packed_conversations_have_the_losses_of_torch_each_alone(model, tmp_path):
    talks = conversations()
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}, ensure_ascii=False) + "\n" for talk in talks))
    corpus, tokenizer = Corpus(name="chat", spec=str(path), format="chat"), Tokenizer(model)
    manifest = prepare_corpus(Task(corpus=corpus, place=tmp_path / "data", tokenizer=model))
    expected, count = torch_losses(model, talks, tmp_path / "tagged")
    assert manifest.trained_tokens == count
    loader = Loader(
        {"chat": 1.0},
        {"chat": tmp_path / "data"},
        sequence_length=256,
        batch_size=1,
        start_id=tokenizer.start_id,
        end_id=tokenizer.end_id,
        tokenizer=tokenizer.fingerprint,
        seed=0,
    )
    loaded, precision = load_model(model), Precision(compute="float32")
    weights = loaded.on_device(precision)
    loss = jax.jit(make_loss(loaded.network, precision.dtype, Full().trains, ("chat", "other")))
    sums: dict[tuple[int, ...], float] = {}
    while len(sums) < len(talks):
        batch = next(loader)
        parts = []
        for segment in range(1, batch["segment_ids"].max() + 1):
            inside = batch["segment_ids"] == segment
            alone = batch | {"weights": batch["weights"] * inside}
            total, metrics = loss(weights, alone)
            np.testing.assert_allclose(metrics["nats"], [total, 0], rtol=1e-6)
            # What is counted by domain are the tokens that are learnt.
            np.testing.assert_array_equal(metrics["tokens"], [alone["weights"].sum(), 0])
            np.testing.assert_array_equal(metrics["positions"], [(batch["segment_ids"] > 0).sum(), 0])
            sums[tuple(batch["targets"][inside])] = float(total)
            parts.append(float(total))
        assert float(loss(weights, batch)[0]) == pytest.approx(sum(parts), rel=1e-5)
    assert sorted(sums.values()) == pytest.approx(sorted(expected), rel=1e-5)
