"""What the new rows start from: old rows, and the segmentation of each new piece in old ids. Old rows are not
touched."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubwordMean:
    """The mean of the rows of the pieces that the new one replaces; weights uniform, or halving from the first or
    the last."""

    weights: Literal["uniform", "first", "last"] = "uniform"

    def build(
        self, table: Float[np.ndarray, "V D"], pieces: Sequence[Sequence[int]], seed: int
    ) -> Float[np.ndarray, "N D"]:
        rows = np.empty((len(pieces), table.shape[1]), np.float32)
        for index, ids in enumerate(pieces):
            weights = np.ones(len(ids)) if self.weights == "uniform" else 0.5 ** np.arange(len(ids))
            if self.weights == "last":
                weights = weights[::-1]
            rows[index] = (weights / weights.sum()) @ table[list(ids)].astype(np.float64)
        return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean of the whole table, for every new piece."""

    def build(
        self, table: Float[np.ndarray, "V D"], pieces: Sequence[Sequence[int]], seed: int
    ) -> Float[np.ndarray, "N D"]:
        return np.tile(table.mean(0, dtype=np.float64).astype(np.float32), (len(pieces), 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random:
    """Normal with the table's mean and covariance (Hewitt 2021)."""

    def build(
        self, table: Float[np.ndarray, "V D"], pieces: Sequence[Sequence[int]], seed: int
    ) -> Float[np.ndarray, "N D"]:
        generator = np.random.default_rng(seed)
        mean, covariance = table.mean(0, dtype=np.float64), np.cov(table.astype(np.float64), rowvar=False)
        return generator.multivariate_normal(mean, covariance, size=len(pieces), method="cholesky").astype(np.float32)


InitRows = SubwordMean | Mean | Random
