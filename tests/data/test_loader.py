"""The loader: exact shares, whole documents, and an order that goes on exactly."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from loader_inputs import END, START, Letters, documents, loader

from cpt_jax.core.errors import UserError
from cpt_jax.data.packing import SplitDocuments, documents_in_a_row
from cpt_jax.data.prepare import NOT_LEARNT, prepare
from cpt_jax.data.sources import SkipCounts


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name, count, mean, first in (("zh", 300, 40, 1000), ("en", 60, 130, 5000)):
        prepare(name, iter(documents(count, mean, first, count)), SkipCounts(), Letters(), root / name)
    return {name: root / name for name in ("zh", "en")}


def test_shares_are_exact_in_tokens_and_rows_are_full(directories):
    batches = loader(directories)
    rows = [next(batches) for _ in range(250)]
    weights = np.concatenate([batch["weights"] for batch in rows])
    domains = np.concatenate([batch["domains"] for batch in rows])
    assert abs((domains * weights).sum() / weights.sum() - 0.25) < 0.005
    assert weights.mean() > 0.93


def test_a_target_is_the_next_token_of_the_same_document(directories):
    batch = next(loader(directories))
    for row in range(4):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            inside = batch["segment_ids"][row] == segment
            inputs, targets = batch["inputs"][row][inside], batch["targets"][row][inside]
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            np.testing.assert_array_equal(batch["positions"][row][inside], np.arange(inside.sum()))
            assert len(set(targets) - {END}) <= 1
    padding = batch["segment_ids"] == 0
    assert (batch["weights"][padding] == 0).all()
    assert (batch["weights"][~padding] == 1).all()


def test_a_long_document_is_split_and_every_token_predicted_once():
    tokens = np.arange(10, 60)
    pieces = SplitDocuments(16, (START, END), 0).flat_map((tokens, np.ones(50, bool)))
    assert max(len(piece["inputs"]) for piece in pieces) == 16
    np.testing.assert_array_equal(np.concatenate([piece["targets"] for piece in pieces]), [*tokens, END])
    np.testing.assert_array_equal(np.concatenate([piece["inputs"] for piece in pieces]), [START, *tokens])


def test_weights_are_those_of_the_targets_and_follow_a_split():
    """Of a conversation, framed by nothing but its template."""
    learnt = np.zeros(50, bool)
    learnt[20:23] = learnt[45:48] = True
    pieces = SplitDocuments(16, None, 0).flat_map((np.arange(100, 150), learnt))
    assert [piece["targets"].tolist()[0] for piece in pieces] == [117, 133], "the first piece teaches nothing"
    for piece in pieces:
        np.testing.assert_array_equal(piece["targets"], piece["inputs"] + 1)
        np.testing.assert_array_equal(piece["weights"], learnt[piece["targets"] - 100])
    assert sum(piece["weights"].sum() for piece in pieces) == learnt.sum()


def test_two_epochs_lose_and_repeat_no_document(directories):
    batches = loader(directories, {"zh": 1.0}, batch_size=1)
    seen, ends = Counter(), 0
    while ends < 600:
        batch = next(batches)
        for segment in range(1, batch["segment_ids"].max() + 1):
            targets = batch["targets"][batch["segment_ids"] == segment]
            if targets[-1] == END:
                ends += 1
                seen[int(batch["inputs"][batch["segment_ids"] == segment][-1])] += 1
    # Rows hold documents of one epoch and the next at the border, so that a few are a row ahead.
    assert set(seen) == set(range(1000, 1300))
    assert max(seen.values()) <= 3
    assert sum(count != 2 for count in seen.values()) < 60


@pytest.mark.parametrize("taken", [0, 1, 15, 16, 17, 40, 90])
def test_it_continues_bit_for_bit(directories, taken):
    batches = loader(directories)
    for _ in range(taken):
        next(batches)
    state = json.dumps(batches.state())
    expected = [next(batches) for _ in range(25)]
    again = loader(directories)
    again.restore(json.loads(state))
    for batch in expected:
        other = next(again)
        for name, array in batch.items():
            np.testing.assert_array_equal(array, other[name])


def test_the_seed_decides_the_order(directories):
    first, same, other = (next(loader(directories, seed=seed))["inputs"] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"zh": 0.7, "en": 0.2}, "sum to 0.9"),
        ({"zh": 1.2, "en": -0.2}, "share of 'en' is -0.2"),
        ({"zh": 1.0}, "another tokenizer"),
    ],
)
def test_wrong_mixtures_are_refused(directories, mixture, message):
    with pytest.raises(UserError, match=message):
        loader(directories, mixture, tokenizer="other" if "another" in message else "letters")


class Numbered:
    """Conversations as text: a token with a minus is a prompt's, and not learnt."""

    fingerprint = "letters"

    def encode_documents(self, texts):
        return [[-int(t) | NOT_LEARNT if t.startswith("-") else int(t) for t in text.split()] for text in texts]


def test_conversations_and_texts_in_one_mixture_continue_bit_for_bit(directories, tmp_path):
    generator = random.Random(5)
    chats = []
    for number in range(9000, 9080):
        turns = [f"-{number}"] * generator.randint(1, 200) + [str(number)] * generator.randint(1, 30)
        chats.append(" ".join(turns * generator.randint(1, 2)))
    manifest = prepare("chat", iter(chats), SkipCounts(), Numbered(), tmp_path, format="chat")
    assert manifest.trained_tokens == sum(not token.startswith("-") for text in chats for token in text.split())
    assert manifest.tokens == sum(len(text.split()) for text in chats)
    mixture, places = {"zh": 0.5, "chat": 0.5}, directories | {"chat": tmp_path}
    batches = loader(places, mixture)
    first = [next(batches) for _ in range(30)]
    state = json.dumps(batches.state())
    expected = [next(batches) for _ in range(30)]
    again = loader(places, mixture)
    again.restore(json.loads(state))
    for batch in expected:
        other = next(again)
        for name, array in batch.items():
            np.testing.assert_array_equal(array, other[name])
    held = {name: np.concatenate([batch[name] for batch in first + expected]) for name in expected[0]}
    chat = (held["domains"] == 1) & (held["segment_ids"] > 0)
    # The mixture counts the tokens of the sequence, not those that are learnt.
    assert abs(chat.sum() / (held["segment_ids"] > 0).sum() - 0.5) < 0.02
    assert 0.05 < held["weights"][chat].mean() < 0.6
    assert (held["weights"][(held["domains"] == 0) & (held["segment_ids"] > 0)] == 1).all()
    assert not (held["inputs"][chat] < 9000).any(), "no start token before a conversation"
    assert not (held["targets"][chat] < 9000).any(), "no end token behind it"


def test_without_packing_a_row_is_one_document_and_it_continues_bit_for_bit(directories):
    batches = loader(directories, packing="none")
    for _ in range(17):
        batch = next(batches)
    state = json.dumps(batches.state())
    for row in range(4):
        inside = batch["segment_ids"][row] > 0
        assert len(set(batch["targets"][row][inside]) - {END}) == 1
        np.testing.assert_array_equal(batch["positions"][row][inside], np.arange(inside.sum()))
        np.testing.assert_array_equal(batch["weights"][row], inside)
    again = loader(directories, packing="none")
    again.restore(json.loads(state))
    for _ in range(25):
        expected, other = next(batches), next(again)
        for name, array in expected.items():
            assert array.dtype == other[name].dtype
            np.testing.assert_array_equal(array, other[name])


def test_no_row_has_more_documents_than_attention_is_told(directories, monkeypatch):
    def most(found) -> int:
        ids = np.concatenate([next(found)["segment_ids"] for _ in range(20)])
        # The padding behind them is one more.
        return int((ids.max(1) + (ids == 0).any(1)).max())

    usual = loader(directories)
    assert 2 < most(usual) <= usual.documents
    monkeypatch.setattr("cpt_jax.data.loader.documents_in_a_row", lambda length, documents_a_token: 3)
    few = loader(directories)
    assert most(few) == few.documents == 3
    # Twice as many as a usual row has, in powers of two.
    assert [documents_in_a_row(2048, 1 / mean) for mean in (5000, 300, 100, 10)] == [16, 16, 64, 512]
