"""Shares of what comes out of the packer: exact in every window, whatever the lengths, and changing as they are told."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from loader_inputs import END, loader

from cpt_jax.core.config import from_json, to_json
from cpt_jax.core.errors import UserError
from cpt_jax.data.loader import _rows_state
from cpt_jax.data.mixture import (
    Mixture,
    Phase,
    Phases,
    Raised,
    Ramp,
    Temperature,
    changes,
    check_mixture,
    described,
    domains_of,
    mean_shares,
    shares_of,
)
from cpt_jax.data.prepare import prepare

LENGTH, ROWS, STEPS = 128, 8, 320
SIZES = {"short": (6000, 30), "long": (60, 1500), "few": (100, 200)}


class Random:
    """Each document is of its number alone; its lengths are drawn, with some that are 20 times the mean."""

    fingerprint = "letters"

    def encode_documents(self, texts):
        return [np.full(int(length), int(number)) for number, length in (text.split() for text in texts)]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for index, (name, (count, mean)) in enumerate(SIZES.items()):
        lengths = 1 + np.random.default_rng(index).lognormal(np.log(mean) - 0.5, 1.0, count).astype(int)
        texts = (f"{100_000 * (index + 1) + number} {length}" for number, length in enumerate(lengths))
        prepare(name, texts, Random(), root / name)
    return {name: root / name for name in SIZES}


def by_row(batches, count: int, names: int = 3) -> np.ndarray:
    """Tokens of each row by domain [rows, names]."""
    rows = []
    for _ in range(count):
        batch = next(batches)
        inside = batch["segment_ids"] > 0
        rows += [np.bincount(d[i], minlength=names) for d, i in zip(batch["domains"], inside, strict=True)]
    return np.array(rows)


def windows(rows: np.ndarray, size: int) -> np.ndarray:
    """Shares in every window of so many rows, wherever it begins."""
    sums = np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(rows, 0)])
    within = sums[size:] - sums[:-size]
    return within / within.sum(1, keepdims=True)


ORDERS = [("best fit", "together"), ("concatenate", "together"), ("none", "together"), ("best fit", "apart")]


@pytest.mark.parametrize(("packing", "pack_domains"), ORDERS)
def test_every_window_of_a_thousand_rows_is_exact_within_half_a_point(directories, packing, pack_domains):
    mixture = {"short": 0.6, "long": 0.25, "few": 0.15}
    batches = loader(directories, mixture, batch_size=ROWS, packing=packing, pack_domains=pack_domains)
    found = windows(by_row(batches, STEPS), 1000)
    assert np.abs(found - [0.6, 0.25, 0.15]).max() < 0.005


@pytest.mark.parametrize(("packing", "pack_domains"), ORDERS)
def test_what_rows_that_were_packed_together_leave_owing_the_next_ones_give_first(directories, packing, pack_domains):
    shares = np.array([0.6, 0.25, 0.15])
    mixture = dict(zip(SIZES, shares.tolist(), strict=True))
    batches = loader(directories, mixture, batch_size=ROWS, packing=packing, pack_domains=pack_domains)
    rows = by_row(batches, STEPS)
    owed = np.cumsum(rows.sum(1))[:, None] * shares - np.cumsum(rows, 0)
    # From the first row to any other, each domain is within a row of its share.
    assert np.abs(owed).max() < LENGTH


@pytest.mark.parametrize("pack_domains", ["together", "apart"])
@pytest.mark.parametrize(
    "mixture",
    [
        Ramp(start={"short": 0.5, "long": 0.5}, end={"short": 0.95, "long": 0.05}),
        Ramp(start={"short": 0.5, "long": 0.5}, end={"short": 0.95, "long": 0.05}, shape="cosine"),
        Phases(
            parts=(
                Phase(share=0.4, mixture={"short": 0.8, "long": 0.2}),
                Phase(share=0.5, mixture=Ramp(start={"short": 0.8, "long": 0.2}, end={"short": 1.0})),
                Phase(share=0.1, mixture={"few": 1.0}),
            )
        ),
    ],
    ids=["linear", "cosine", "phases"],
)
def test_a_schedule_is_followed_to_half_a_point(directories, mixture, pack_domains):
    names = domains_of(mixture)
    batches = loader(directories, mixture, batch_size=ROWS, steps=STEPS, pack_domains=pack_domains)
    rows = by_row(batches, STEPS, len(names))
    expected = shares_of(mixture, names, {})((np.arange(len(rows)) + 0.5) / len(rows))
    weighted = expected * rows.sum(1, keepdims=True)
    assert np.abs(windows(rows, 1000) - windows(weighted, 1000)).max() < 0.005
    # The rows that are packed together blur a border by a few rows.
    assert np.abs(np.cumsum(rows - weighted, 0)).max() < 5 * LENGTH


def test_the_shares_of_now_are_those_of_the_row_that_is_next(directories):
    ramp = Ramp(start={"short": 1.0}, end={"short": 0.5, "long": 0.5})
    with pytest.raises(ValueError, match="needs the number of steps"):
        loader(directories, ramp)
    batches = loader(directories, ramp, batch_size=ROWS, steps=20)
    for number in range(20):
        assert batches.shares_now() == pytest.approx({"short": 1 - number / 40, "long": number / 40})
        next(batches)


def test_the_shares_of_schedules():
    ramp = Ramp(start={"a": 0.5, "b": 0.5}, end={"a": 0.95, "b": 0.05}, shape="cosine")
    np.testing.assert_allclose(shares_of(ramp, ("a", "b"), {})(np.array([0, 0.5, 1]))[:, 1], [0.5, 0.275, 0.05])
    heated = shares_of(Temperature(domains=("a", "b"), temperature=2.0), ("a", "b"), {"a": 900, "b": 100})
    np.testing.assert_allclose(heated(np.zeros(1)), [[0.75, 0.25]])
    anneal = Phases(parts=(Phase(share=0.9, mixture={"a": 1.0}), Phase(share=0.1, mixture={"b": 1.0})))
    # Of 10 rows the last one.
    assert shares_of(anneal, ("a", "b"), {})(np.arange(10) / 10)[:, 1].tolist() == [0] * 9 + [1]
    assert mean_shares(anneal, {}) == pytest.approx({"a": 0.9, "b": 0.1})
    assert mean_shares(ramp, {}) == pytest.approx({"a": 0.725, "b": 0.275}, rel=1e-6)
    # As much as there is.
    even = shares_of(Temperature(domains=("a", "b"), temperature=1.0), ("a", "b"), {"a": 900, "b": 100})
    np.testing.assert_allclose(even(np.zeros(1)), [[0.9, 0.1]])


def test_a_ramp_has_the_domains_of_both_its_ends_and_ends_where_it_is_told():
    ramp = Ramp(start={"a": 1.0}, end={"a": 0.4, "b": 0.6})
    assert domains_of(ramp) == ("a", "b")
    # Rows are packed beyond the last one of the stage.
    found = shares_of(ramp, ("a", "b"), {})(np.array([0, 0.5, 1, 1.25]))
    np.testing.assert_allclose(found[:, 1], [0, 0.3, 0.6, 0.6])


def test_a_ramp_within_a_phase_goes_from_the_phases_first_row_to_its_last():
    ramp = Ramp(start={"a": 1.0}, end={"b": 1.0})
    # 0.1 + 0.2 is more than 0.3 in floating point: of 10 rows the fourth is the ramp's first.
    parts = (Phase(share=0.1, mixture={"a": 1.0}), Phase(share=0.2, mixture={"b": 1.0}), Phase(share=0.7, mixture=ramp))
    found = shares_of(Phases(parts=parts), ("a", "b"), {})(np.arange(11) / 10)[:, 1]
    np.testing.assert_allclose(found, [0, 1, 1, *(np.arange(8) / 7)], atol=1e-9)
    assert changes(ramp)
    assert changes(Phases(parts=parts))
    assert not changes({"a": 1.0})


@pytest.mark.parametrize("packing", ["best fit", "concatenate"])
def test_rows_have_room_for_as_many_documents_as_the_domain_with_the_shortest_fills_them_with(directories, packing):
    batches = loader(directories, {"long": 0.1, "short": 0.9}, sequence_length=1024, packing=packing)
    # Some 35 of the short ones.
    assert np.mean([(next(batches)["segment_ids"] > 0).mean() for _ in range(30)]) > 0.97


def test_a_domain_that_was_read_often_enough_gives_its_share_to_the_others(directories):
    mixture = {"short": 0.5, "long": 0.3, "few": 0.2}
    batches = loader(directories, mixture, batch_size=ROWS, max_epochs={"few": 2})
    rows = by_row(batches, 350)
    last = rows[-800:].sum(0) / rows[-800:].sum()
    np.testing.assert_allclose(last, [0.625, 0.375, 0], atol=0.01)
    assert batches.epochs()["few"] == 2
    sizes = 1 + np.random.default_rng(2).lognormal(np.log(200) - 0.5, 1.0, 100).astype(int)
    assert rows[:, 2].sum() == 2 * (sizes + 1).sum(), "each token of it twice, and each document's end"


def test_where_all_text_is_used_the_last_batch_is_filled_up(directories):
    batches = list(loader(directories, {"few": 1.0}, batch_size=ROWS, max_epochs={"few": 1}))
    assert {len(batch["inputs"]) for batch in batches} == {ROWS}
    tail = batches[-1]["segment_ids"].max(1)
    assert not batches[-1]["weights"][tail == 0].any()


def changed_mixture_state(directories, before, after, taken: int, **how):
    """Batches under one mixture, and those that follow under another, from the state in between."""
    batches = loader(directories, before, batch_size=ROWS, **how)
    first = [next(batches) for _ in range(taken)]
    again = loader(directories, after, batch_size=ROWS, **how)
    again.restore(json.loads(json.dumps(batches.state())))
    return first, again


@pytest.mark.parametrize(("packing", "pack_domains"), ORDERS)
def test_another_mixture_in_the_middle_loses_and_repeats_no_token(directories, packing, pack_domains):
    how = dict(packing=packing, pack_domains=pack_domains, max_epochs={"long": 1, "few": 1})
    first, again = changed_mixture_state(
        directories, {"long": 0.8, "few": 0.2}, {"few": 0.3, "long": 0.4, "short": 0.3}, 21, **how
    )
    seen = Counter()
    for number, batch in enumerate([*first, *(next(again) for _ in range(300))]):
        inside = (batch["segment_ids"] > 0) & (batch["targets"] != END)
        seen.update(batch["targets"][inside].tolist())
        assert number < 21 or set(np.unique(batch["domains"][inside])) <= {0, 1, 2}
    for index, name in ((1, "long"), (2, "few")):
        count, mean = SIZES[name]
        lengths = 1 + np.random.default_rng(index).lognormal(np.log(mean) - 0.5, 1.0, count).astype(int)
        expected = {100_000 * (index + 1) + number: length for number, length in enumerate(lengths)}
        assert {token: seen[token] for token in expected} == expected, name


def assert_same_rows_at_hand(batches, again) -> None:
    """Until others are packed, `again` gives what `batches` gives."""

    def group() -> int:
        return _rows_state(batches.state()["rows"])["group"]

    number, compared = group(), 0
    for batch in batches:
        if group() != number:
            break
        other, compared = next(again), compared + 1
        for field in ("inputs", "targets", "positions", "segment_ids", "weights"):
            np.testing.assert_array_equal(batch[field], other[field])
    assert compared


STEEP = Ramp(start={"few": 1.0}, end={"few": 0.1, "long": 0.9})


@pytest.mark.parametrize("packing", ["best fit", "concatenate", "none"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"mixture": {"long": 1.0}}, {"mixture": {"short": 0.5, "long": 0.3, "few": 0.2}}),
        (
            {"mixture": {"few": 1.0}, "max_epochs": {"few": 1}},
            {"mixture": {"long": 0.5, "few": 0.5}, "max_epochs": {"few": 1}},
        ),
        ({"max_epochs": {"few": 1}}, {"max_epochs": {"few": 2}}),
        ({}, {"max_epochs": {"few": 1}}),
        ({"mixture": STEEP}, {}),
    ],
    ids=["a domain before the others", "one where the text ends", "more epochs", "fewer epochs", "after a ramp"],
)
def test_rows_that_are_packed_already_are_not_packed_otherwise(directories, monkeypatch, packing, before, after):
    how = dict(mixture={"few": 0.5, "long": 0.5}, batch_size=ROWS, sequence_length=1024, packing=packing, steps=12)
    # Rows of two documents, as if one that joins had the shorter ones.
    with monkeypatch.context() as few:
        few.setattr("cpt_jax.data.loader.documents_in_a_row", lambda length, documents_a_token: 3)
        batches = loader(directories, **(how | before))
    # Where each document is a row, an epoch of "few" is over within the second group.
    for _ in range(9 if packing == "none" else 1):
        next(batches)
    again = loader(directories, **(how | after))
    again.restore(json.loads(json.dumps(batches.state())))
    assert_same_rows_at_hand(batches, again)


@pytest.mark.parametrize("packing", ["best fit", "concatenate", "none"])
def test_shares_that_are_raised_leave_the_rows_at_hand(directories, packing):
    batches, again = (
        loader(directories, {"short": 0.8, "long": 0.2}, batch_size=ROWS, packing=packing) for _ in range(2)
    )
    for _ in range(9):
        next(batches), next(again)
    again.raise_shares(Raised(domains=("long",), factor=4.0, maximum=0.6))
    assert_same_rows_at_hand(batches, again)


@pytest.mark.parametrize(("packing", "pack_domains"), ORDERS)
@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 3), (3, 1)])
def test_another_limit_of_epochs_in_the_middle_loses_and_repeats_no_document(
    directories, packing, pack_domains, before, after
):
    mixture, how = {"few": 0.8, "short": 0.2}, dict(batch_size=ROWS, packing=packing, pack_domains=pack_domains)
    batches = loader(directories, mixture, max_epochs={"few": before}, **how)
    count, mean = SIZES["few"]
    lengths = 1 + np.random.default_rng(2).lognormal(np.log(mean) - 0.5, 1.0, count).astype(int)
    first, more = [], 70 if packing == "none" else 40
    # Before, while and after an epoch is over.
    for taken in (12, 20, 24, 29, 40):
        first += [next(batches) for _ in range(taken - len(first))]
        again = loader(directories, mixture, max_epochs={"few": after}, **how)
        again.restore(json.loads(json.dumps(batches.state())))
        seen = Counter()
        for batch in [*first, *(next(again) for _ in range(more * after))]:
            inside = (batch["segment_ids"] > 0) & (batch["targets"] != END)
            seen.update(batch["targets"][inside].tolist())
        times = {seen[300_000 + number] / length for number, length in enumerate(lengths)}
        # Rows that are packed already may begin another epoch.
        assert times == {after} or (after < before and times <= {1, 2}), taken


@pytest.mark.parametrize("pack_domains", ["together", "apart"])
def test_a_domain_that_joins_fills_its_rows(directories, pack_domains):
    before, after = {"long": 1.0}, {"long": 0.1, "short": 0.9}
    _, again = changed_mixture_state(directories, before, after, 3, sequence_length=1024, pack_domains=pack_domains)
    # Some 35 of the short ones in a row, where there were some two of the long ones.
    assert np.mean([(next(again)["segment_ids"] > 0).mean() for _ in range(30)][10:]) > 0.97


@pytest.mark.parametrize("pack_domains", ["together", "apart"])
def test_raised_shares_hold_from_the_next_rows_on_and_are_part_of_the_state(directories, pack_domains):
    mixture, how = {"short": 0.8, "long": 0.2}, dict(batch_size=ROWS, pack_domains=pack_domains)
    batches = loader(directories, mixture, **how)
    for _ in range(20):
        next(batches)
    batches.raise_shares(Raised(domains=("long",), factor=4.0, maximum=0.6))
    state = json.dumps(batches.state())
    again = loader(directories, mixture, **how)
    again.restore(json.loads(state))
    for _ in range(5):
        for one, other in zip(next(batches).values(), next(again).values(), strict=True):
            np.testing.assert_array_equal(one, other)
    for _ in range(8):
        next(batches)
    rows = by_row(batches, 60, 2)
    assert abs(rows[:, 1].sum() / rows.sum() - 0.6) < 0.01
    assert batches.raised() == Raised(domains=("long",), factor=4.0, maximum=0.6)


def test_raised_shares_stay_shares():
    given = shares_of({"a": 0.7, "b": 0.2, "c": 0.1}, ("a", "b", "c"), {})
    raised = Raised(domains=("b", "c"), factor=1.5, maximum=0.9).over(given, ("a", "b", "c"))(np.zeros(1))
    np.testing.assert_allclose(raised, [[0.55, 0.3, 0.15]])
    none = Raised(domains=("b",), factor=2.0, maximum=0.9).over(
        shares_of(Ramp(start={"a": 1.0, "b": 0.0}, end={"a": 1.0}), ("a", "b"), {}), ("a", "b")
    )
    np.testing.assert_allclose(none(np.zeros(1)), [[1.0, 0.0]])
    # One that has all of it, and one that has more than the maximum already.
    whole = Raised(domains=("a",), factor=2.0, maximum=0.9).over(shares_of({"a": 1.0}, ("a", "b"), {}), ("a", "b"))
    np.testing.assert_array_equal(whole(np.zeros(1)), [[1.0, 0.0]])
    above = Raised(domains=("a",), factor=2.0, maximum=0.5).over(given, ("a", "b", "c"))
    np.testing.assert_allclose(above(np.zeros(1)), [[0.7, 0.2, 0.1]])


@pytest.mark.parametrize(
    ("state", "mixture", "message"),
    [
        ({"sizes": {"long": [60, 1]}}, {"long": 1.0}, "60 documents of 'long'"),
        ({"sizes": {"gone": [1, 1]}}, {"long": 1.0}, "begun with 'gone'"),
    ],
)
def test_a_state_of_other_documents_is_refused(directories, state, mixture, message):
    with pytest.raises(UserError, match=message):
        loader(directories, mixture).restore(state)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Phases(parts=(Phase(share=0.5, mixture={"a": 1.0}),)), "the phases cover 0.5 of the stage"),
        (lambda: Ramp(start={"a": 0.5, "b": 0.5}, end={"a": 0.5}), "Ramp.end: the shares sum to 0.5"),
        (lambda: Ramp(start={"a": 1.5, "b": -0.5}, end={"a": 1.0}), "share of 'b' is -0.5"),
        (lambda: Temperature(domains=("a",), temperature=0.5), "temperature is 0.5"),
        (lambda: Temperature(domains=("a", "b", "a")), "give each domain once"),
        (lambda: Phase(share=0.0, mixture={"a": 1.0}), "Phase.share is 0"),
        (lambda: Phase(share=1.0, mixture={"a": 0.5, "b": 0.4}), "Phase.mixture: the shares sum to 0.9"),
        (lambda: check_mixture({"a": 1.0, "b": 0.0}), "the share of 'b' is 0.0: give a number above 0"),
        (lambda: check_mixture({"a": 1.0, "b": math.nan}), "the share of 'b' is nan"),
        (lambda: Ramp(start={"a": 1.0}, end={"a": math.nan}), "Ramp.end: the share of 'a' is nan"),
    ],
)
def test_wrong_schedules_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_mixtures_in_words():
    ramp = Ramp(start={"a": 1.0}, end={"a": 0.25, "b": 0.75})
    assert described(ramp) == "a 100% to a 25% b 75% (linear)"
    assert described(Temperature(domains=("a", "b"))) == "a b by size, temperature 2"
    phases = Phases(parts=(Phase(share=0.9, mixture=ramp), Phase(share=0.1, mixture={"b": 1.0})))
    assert described(phases) == f"0.9 of it: {described(ramp)}; then 0.1 of it: b 100%"


def test_every_mixture_comes_back_from_its_json():
    ramp = Ramp(start={"a": 0.5, "b": 0.5}, end={"a": 1.0})
    for mixture in ({"a": 1.0}, ramp, Temperature(domains=("a", "b")), Phases(parts=(Phase(share=1.0, mixture=ramp),))):
        assert from_json(Mixture, json.loads(json.dumps(to_json(mixture)))) == mixture
