"""New rows from the old ones, against plain formulas."""

import dataclasses

import numpy as np
import pytest
from row_inputs import NEW, context_of, table

from cpt_jax.vocab.init_rows import Mean, Random, SubwordMean, _covariance, size_of_rows
from cpt_jax.vocab.tokenizer import Tokenizer


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("weights", ["uniform", "length", "first", "last"])
def test_subword_means_are_those_of_a_plain_sum(grown, weights, calibrated):
    context, tables = context_of(*grown), {"embed": table(320), "head": -table(320, 5)}
    rows = SubwordMean(weights=weights, calibrated=calibrated).build(tables, context)
    for name, old in tables.items():
        assert rows[name].shape == (NEW, old.shape[1])
        for row, ids in zip(rows[name], context.pieces, strict=True):
            row_sum, total, norms = np.zeros(old.shape[1]), 0.0, []
            for place, index in enumerate(ids):
                of_kind = {
                    "uniform": 1.0,
                    "length": len(context.base.backend.id_to_token(index)),
                    "first": 2.0**-place,
                    "last": 2.0 ** (place - len(ids)),
                }
                row_sum += of_kind[weights] * old[index].astype(np.float64)
                total += of_kind[weights]
                norms.append(np.linalg.norm(old[index]))
            expected = row_sum / total
            if calibrated:
                expected *= np.mean(norms) / np.linalg.norm(expected)
            np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)


def test_a_part_of_a_character_weighs_its_own_bytes(grown):
    base = Tokenizer(grown[0])
    (word,), (first, *_) = base.encode(" the"), base.encode("法")
    tables = {"embed": table(320)}
    rows = SubwordMean(weights="length").build(tables, context_of(*grown, pieces=[[word, first]]))
    expected = (4 * tables["embed"][word] + tables["embed"][first]) / 5
    np.testing.assert_allclose(rows["embed"][0], expected, rtol=1e-5)


def test_the_mean_is_that_of_the_whole_table(grown):
    tables = {"embed": table(320), "head": -table(320, 5)}
    rows = Mean().build(tables, context_of(*grown))
    for name, old in tables.items():
        np.testing.assert_allclose(rows[name], np.tile(old.mean(0), (NEW, 1)), rtol=1e-5)


def test_random_rows_have_the_tables_mean_and_covariance(grown):
    old = {"embed": table(5000)}
    old["embed"][:, 1] += 2 * old["embed"][:, 0]
    context = context_of(*grown, pieces=[[0]] * 40_000)
    rows = Random().build(old, context)["embed"]
    covariance = np.cov(old["embed"], rowvar=False)
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    np.testing.assert_allclose(np.cov(rows, rowvar=False) / scale, covariance / scale, atol=0.03)
    np.testing.assert_allclose((rows.mean(0) - old["embed"].mean(0)) / np.sqrt(np.diag(covariance)), 0, atol=0.03)
    np.testing.assert_array_equal(Random().build(old, context)["embed"], rows)
    other = Random().build(old, dataclasses.replace(context, seed=4))["embed"]
    assert np.abs(other - rows).max() > 1


def test_rows_that_cancel_give_a_row_of_zeros(grown):
    tables = {"embed": np.array([[1.0, 2.0], [-1.0, -2.0]], np.float32)}
    rows = SubwordMean(calibrated=True).build(tables, context_of(*grown, pieces=[[0, 1]]))
    np.testing.assert_array_equal(rows["embed"], [[0, 0]])


def test_the_covariance_is_that_of_a_sample():
    few = table(5)
    np.testing.assert_allclose(_covariance(few, few.mean(0)), np.cov(few, rowvar=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [40, 5000])
def test_the_size_of_rows_is_their_root_mean_square_in_all_tables_alike(count):
    rows = np.random.default_rng(0).normal(0, 0.02, (count, 64)).astype(np.float32)
    assert size_of_rows([rows]) == pytest.approx(0.02, rel=0.1)
    assert size_of_rows([rows, 9 * rows]) == pytest.approx(0.06, rel=0.1)
    # Rows that were never trained do not count.
    empty = np.zeros((count // 4, 64), np.float32)
    assert size_of_rows([np.concatenate([rows, empty])]) == pytest.approx(0.02, rel=0.1)
