"""The loader: exact shares, whole documents, and an order that goes on exactly."""

import json
import random
import time
from collections import Counter

import numpy as np
import pytest
from loader_inputs import END, START, Letters, documents, loader

from cpt_jax.core.errors import UserError
from cpt_jax.data.documents import FEW, _shuffled
from cpt_jax.data.packing import OPEN_ROWS, documents_in_a_row
from cpt_jax.data.prepare import NOT_LEARNT, prepare


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name, count, mean, first in (("zh", 300, 40, 1000), ("en", 60, 130, 5000)):
        prepare(name, iter(documents(count, mean, first, count)), Letters(), root / name)
    return {name: root / name for name in ("zh", "en")}


def test_shares_are_exact_in_tokens_and_rows_are_full(directories):
    batches = loader(directories)
    rows = [next(batches) for _ in range(250)]
    weights = np.concatenate([batch["weights"] for batch in rows])
    domains = np.concatenate([batch["domains"] for batch in rows])
    assert abs((domains * weights).sum() / weights.sum() - 0.25) < 0.005
    assert weights.mean() > 0.93


@pytest.mark.parametrize("count", [1, 4, FEW - 1, FEW])
def test_every_epoch_has_every_document_once_in_an_order_of_its_own(count):
    whole = _shuffled(count, 7)
    epochs = [[whole[epoch * count + place] for place in range(count)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 5 or len({tuple(epoch) for epoch in epochs}) == 3
    assert count < 5 or [_shuffled(count, 8)[place] for place in range(count)] != epochs[0]


def test_few_short_documents_are_read_as_fast_as_many():
    # By grain's order 2,000 numbers of four take ten seconds.
    order, started = _shuffled(4, 7), time.monotonic()
    for number in range(2000):
        order[number]
    assert time.monotonic() - started < 2


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


class Numbered:
    """Tokens as text; one with a minus is a prompt's, and not learnt."""

    fingerprint = "letters"

    def encode_documents(self, texts):
        return [[-int(t) | NOT_LEARNT if t.startswith("-") else int(t) for t in text.split()] for text in texts]


def pieces(batch):
    """Of a batch's rows, each piece's (inputs, targets, weights)."""
    for row in range(len(batch["inputs"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            inside = batch["segment_ids"][row] == segment
            yield tuple(batch[name][row][inside] for name in ("inputs", "targets", "weights"))


def one_document(directory, tokens, **changes):
    """The pieces of an epoch of one document."""
    prepare("one", iter([" ".join(map(str, tokens))]), Numbered(), directory, **changes.pop("how", {}))
    found = loader({"one": directory}, {"one": 1.0}, batch_size=1, max_epochs={"one": 1}, **changes)
    return [piece for batch in found for piece in pieces(batch)]


@pytest.mark.parametrize("packing", ["best fit", "concatenate", "none"])
def test_a_long_document_is_split_and_every_token_predicted_once(tmp_path, packing):
    found = one_document(tmp_path, range(10, 60), sequence_length=16, packing=packing)
    assert max(len(inputs) for inputs, _, _ in found) == 16
    found.sort(key=lambda piece: piece[0][-1])
    np.testing.assert_array_equal(np.concatenate([targets for _, targets, _ in found]), [*range(10, 60), END])
    np.testing.assert_array_equal(np.concatenate([inputs for inputs, _, _ in found]), [START, *range(10, 60)])


def test_a_long_document_is_cut_or_left_out(tmp_path):
    [(inputs, targets, _)] = one_document(tmp_path / "cut", range(10, 60), sequence_length=16, long_documents="cut")
    assert inputs.tolist() == [START, *range(10, 25)]
    assert targets.tolist() == list(range(10, 26))
    assert not one_document(tmp_path / "out", range(10, 60), sequence_length=16, long_documents="leave out")
    assert one_document(tmp_path / "fits", range(10, 25), sequence_length=16, long_documents="leave out")


def test_a_domain_of_which_no_document_can_be_used_is_told(directories):
    with pytest.raises(UserError, match="en: none of 60 documents can be used"):
        next(loader(directories, {"en": 1.0}, sequence_length=1, long_documents="leave out"))


@pytest.mark.parametrize("packing", ["best fit", "concatenate"])
def test_weights_are_those_of_the_targets_and_follow_a_split(tmp_path, packing):
    """Of a conversation, framed by nothing but its template."""
    learnt = set(range(120, 123)) | set(range(145, 148))
    tokens = [number if number in learnt else -number for number in range(100, 150)]
    found = one_document(tmp_path, tokens, sequence_length=16, packing=packing, how={"format": "chat"})
    found.sort(key=lambda piece: piece[0][0])
    assert [targets[0] for _, targets, _ in found] == [117, 133], "the first piece teaches nothing"
    for inputs, targets, weights in found:
        np.testing.assert_array_equal(targets, inputs + 1)
        np.testing.assert_array_equal(weights, [target in learnt for target in targets])


def test_the_end_is_learnt_where_the_text_before_it_is(tmp_path):
    """A text that was cut gives no lesson in where texts end."""
    texts = ["10 11 12", "20 21 -22", "30 31 32", "40", "-50"]
    prepare("some", iter(texts), Numbered(), tmp_path)
    found = loader({"some": tmp_path}, {"some": 1.0}, batch_size=1, sequence_length=16, max_epochs={"some": 1})
    lessons = {
        int(inputs[1]): list(zip(targets, weights, strict=True))
        for b in found
        for inputs, targets, weights in pieces(b)
    }
    assert lessons[10] == [(10, 1), (11, 1), (12, 1), (END, 1)]
    assert lessons[20] == [(20, 1), (21, 1), (22, 0), (END, 0)]
    assert lessons[30][-1] == (END, 1)
    assert lessons[40] == [(40, 1), (END, 1)]
    assert 50 not in lessons, "nothing of it is learnt"


def test_a_piece_is_kept_for_its_last_target_and_left_out_for_its_first_input(tmp_path):
    tokens = [number if number == 116 else -number for number in range(100, 150)]
    [(inputs, targets, _)] = one_document(tmp_path, tokens, sequence_length=16, how={"format": "chat"})
    assert (inputs[0], targets[-1]) == (100, 116)


ORDERS = [("best fit", "together"), ("concatenate", "together"), ("best fit", "apart"), ("concatenate", "apart")]


@pytest.mark.parametrize(("packing", "pack_domains"), [*ORDERS, ("none", "together")])
def test_two_epochs_lose_and_repeat_no_token(directories, packing, pack_domains):
    found = loader(directories, packing=packing, pack_domains=pack_domains, max_epochs={"zh": 2, "en": 2})
    seen = Counter(int(t) for batch in found for _, targets, _ in pieces(batch) for t in targets if t != END)
    for name, count, mean, first in (("zh", 300, 40, 1000), ("en", 60, 130, 5000)):
        texts = documents(count, mean, first, count)
        expected = {first + index: 2 * len(text.split()) for index, text in enumerate(texts)}
        assert {token: seen[token] for token in expected} == expected, name


def test_an_epoch_is_over_before_the_next_begins(directories):
    batches, seen = loader(directories, {"zh": 1.0}, batch_size=1), Counter()
    for _ in range(300):
        for inputs, targets, _ in pieces(next(batches)):
            if targets[-1] == END:
                seen[int(inputs[-1])] += 1
    assert max(seen.values()) > 2
    # Of one epoch and the next are only the rows that are packed together.
    at_the_border = OPEN_ROWS * 128 / 41
    assert sum(max(seen.values()) - count for count in seen.values()) < 300 + at_the_border
    assert max(seen.values()) - min(seen.values()) <= 2


@pytest.mark.parametrize("pack_domains", ["together", "apart"])
def test_epochs_are_told_to_the_document_where_the_rows_at_hand_began(directories, pack_domains):
    how = dict(packing="none", pack_domains=pack_domains, batch_size=1, sequence_length=1024)
    batches = loader(directories, {"zh": 1.0}, **how)
    for begun in (0, OPEN_ROWS, 5 * OPEN_ROWS):
        while batches.epochs()["zh"] < begun / 300:
            next(batches)
        assert batches.epochs() == {"zh": begun / 300}


@pytest.mark.parametrize(("packing", "pack_domains"), ORDERS)
@pytest.mark.parametrize("taken", [0, 1, 15, 16, 17, 40, 90])
def test_it_continues_bit_for_bit(directories, taken, packing, pack_domains):
    how = dict(packing=packing, pack_domains=pack_domains)
    batches = loader(directories, **how)
    for _ in range(taken):
        next(batches)
    state = json.dumps(batches.state())
    expected = [next(batches) for _ in range(25)]
    again = loader(directories, **how)
    again.restore(json.loads(state))
    for batch in expected:
        other = next(again)
        for name, array in batch.items():
            np.testing.assert_array_equal(array, other[name])


@pytest.mark.parametrize("pack_domains", ["together", "apart"])
def test_a_state_of_another_version_is_told(directories, pack_domains):
    whole = loader(directories, pack_domains=pack_domains)
    next(iter(whole))
    text = json.dumps(whole.state())
    assert '"limits"' in text
    again = loader(directories, pack_domains=pack_domains)
    with pytest.raises(UserError, match="another version of cpt_jax has written"):
        again.restore(json.loads(text.replace('"limits"', '"most"')))


def test_the_seed_decides_the_order(directories):
    first, same, other = (next(loader(directories, seed=seed))["inputs"] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


@pytest.mark.parametrize("pack_domains", ["together", "apart"])
def test_the_order_in_which_domains_are_named_decides_their_numbers_alone(directories, pack_domains):
    how = dict(pack_domains=pack_domains)
    batches = loader(directories, {"zh": 0.5, "en": 0.5}, **how), loader(directories, {"en": 0.5, "zh": 0.5}, **how)
    for _ in range(20):
        one, other = (next(each) for each in batches)
        np.testing.assert_array_equal(one["inputs"], other["inputs"])
        inside = one["segment_ids"] > 0
        np.testing.assert_array_equal(one["domains"][inside], 1 - other["domains"][inside])


def order_of(batches, name: str, first: int) -> list[int]:
    """The numbers of a domain's documents, one a row, as they come."""
    index, found = batches.names.index(name), []
    for batch in batches:
        found += [int(row[1]) - first for row in batch["inputs"][batch["domains"][:, 0] == index] if row[1]]
    return found


def test_a_domain_has_an_order_of_its_own_whatever_it_is_mixed_with(tmp_path):
    # Line n of one is line n of the other, as in translations: they are not to be read side by side.
    firsts = {"one": 1000, "other": 2000}
    places = {name: tmp_path / name for name in firsts}
    for name, first in firsts.items():
        prepare(name, iter(documents(60, 10, first, 7)), Letters(), places[name])
    how = dict(packing="none", batch_size=1, sequence_length=256)
    orders = {}
    for name, first in firsts.items():
        orders[name] = order_of(loader(places, {name: 1.0}, max_epochs={name: 2}, **how), name, first)
        assert sorted(orders[name]) == sorted([*range(60)] * 2)
    assert orders["one"] != orders["other"]
    for mixture in ({"one": 0.5, "other": 0.5}, {"other": 0.8, "one": 0.2}):
        mixed = [loader(places, mixture, max_epochs=dict.fromkeys(mixture, 2), **how) for _ in firsts]
        for batches, (name, first) in zip(mixed, firsts.items(), strict=True):
            assert order_of(batches, name, first) == orders[name]


def test_rows_that_are_packed_together_come_in_another_order_each_time(tmp_path):
    # Each document fills a row: without packing they come as they are read.
    how, orders = dict(batch_size=1, sequence_length=8), []
    for name in ("one", "other"):
        texts = [" ".join([str(1000 + number)] * 7) for number in range(2 * OPEN_ROWS)]
        prepare(name, iter(texts), Letters(), tmp_path / name)
        for seed in (3, 4):
            read, packed = (
                order_of(loader({name: tmp_path / name}, {name: 1.0}, max_epochs={name: 1}, seed=seed, **each), name, 0)
                for each in (how | {"packing": "none"}, how)
            )
            for group in (slice(0, OPEN_ROWS), slice(OPEN_ROWS, 2 * OPEN_ROWS)):
                orders.append(tuple(read[group].index(document) for document in packed[group]))
    assert len({*orders, tuple(range(OPEN_ROWS))}) == 9, "by domain, seed and group"


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


@pytest.mark.parametrize(("texts", "how"), [([], {}), (["-5 -6 -7"], {"format": "chat"})], ids=["none", "prompts"])
def test_a_domain_in_which_nothing_is_to_be_learnt_is_refused(tmp_path, texts, how):
    prepare("mute", iter(texts), Numbered(), tmp_path, **how)
    with pytest.raises(UserError, match="domain 'mute' has no text to train on"):
        loader({"mute": tmp_path}, {"mute": 1.0})


@pytest.mark.parametrize(("packing", "pack_domains"), ORDERS)
def test_conversations_and_texts_in_one_mixture_continue_bit_for_bit(directories, tmp_path, packing, pack_domains):
    generator = random.Random(5)
    chats = []
    for number in range(9000, 9080):
        turns = [f"-{number}"] * generator.randint(1, 200) + [str(number)] * generator.randint(1, 30)
        chats.append(" ".join(turns * generator.randint(1, 2)))
    manifest = prepare("chat", iter(chats), Numbered(), tmp_path, format="chat")
    assert manifest.trained_tokens == sum(not token.startswith("-") for text in chats for token in text.split())
    assert manifest.tokens == sum(len(text.split()) for text in chats)
    mixture, places = {"zh": 0.5, "chat": 0.5}, directories | {"chat": tmp_path}
    how = dict(packing=packing, pack_domains=pack_domains)
    batches = loader(places, mixture, **how)
    first = [next(batches) for _ in range(30)]
    state = json.dumps(batches.state())
    expected = [next(batches) for _ in range(30)]
    again = loader(places, mixture, **how)
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
    assert batches.documents == 2, "one, and the padding behind it"
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


@pytest.mark.parametrize("packing", ["best fit", "concatenate"])
@pytest.mark.parametrize("pack_domains", ["together", "apart"])
def test_no_row_has_more_documents_than_attention_is_told(directories, monkeypatch, packing, pack_domains):
    def most(found) -> int:
        ids = np.concatenate([next(found)["segment_ids"] for _ in range(20)])
        # The padding behind them is one more.
        return int((ids.max(1) + (ids == 0).any(1)).max())

    how = {"packing": packing, "pack_domains": pack_domains}
    usual = loader(directories, **how)
    assert 2 < most(usual) <= usual.documents
    monkeypatch.setattr("cpt_jax.data.loader.documents_in_a_row", lambda length, documents_a_token: 3)
    few = loader(directories, **how)
    assert most(few) == few.documents == 3
    # All of the text, however many rows it takes.
    once = loader(directories, **how, max_epochs={"zh": 1, "en": 1})
    tokens = sum(int(batch["weights"].sum()) for batch in once)
    assert tokens == sum(once.tokens.values()) + sum(once.records.values())
    # Twice as many as a usual row has, in powers of two.
    assert [documents_in_a_row(2048, 1 / mean) for mean in (5000, 300, 100, 10)] == [16, 16, 64, 512]
