"""What the new rows start from, in the input table and, where it is not tied, the output table; and in that of the
layers' inputs, where there is one. Old rows are not touched."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from cpt_jax.core.errors import UserError
from cpt_jax.core.lazy import LazyArray
from cpt_jax.vocab.distil import FrozenModel, distilled_rows
from cpt_jax.vocab.static import static_vectors, word_vectors
from cpt_jax.vocab.tokenizer import Tokenizer

# New rows compared with old ones at once: 16,000 of them with 100,000 would be 13 GB, several times over.
ROWS_AT_ONCE = 256
# A good rate for new rows alone, by the size of the base's (0.13 in SmolLM2-135M, 0.017 in Qwen 2.5 0.5B): AdamW's steps are
# as large whatever they change, and throw small rows about before these learn (LOG.md).
ROWS_STEP = 0.065
# As that, of rows that are fitted to what the frozen model does.
FITTED_STEP = 0.015
# The size is that of so many rows in so many places.
_STRETCH, _STRETCHES = 64, 16

Rows = Float[np.ndarray, "N D"]
# A large one is read where it is needed.
Table = Float[np.ndarray, "V D"] | LazyArray
Tables = Mapping[str, Table]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowContext:
    """What rows can be made from besides the old ones.

    Attributes:
      pieces: the segmentation of each new piece in old ids.
      base, extended: the tokenizers.
      texts: training text of the new domain.
      model: the frozen base model.
      seed: of what is drawn.
    """

    pieces: Sequence[Sequence[int]]
    base: Tokenizer
    extended: Tokenizer
    texts: Callable[[], Iterable[str]]
    model: Callable[[], FrozenModel]
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubwordMean:
    """The weighted mean of the rows of the pieces that the new one replaces.

    `weights`: uniform; by the pieces' length in bytes; or halving from the first or the last piece. `calibrated`
    scales each row to the mean norm of the rows it is made of.
    """

    weights: Literal["uniform", "length", "first", "last"] = "uniform"
    calibrated: bool = False

    def _weights(self, ids: Sequence[int], context: RowContext) -> np.ndarray:
        if self.weights == "length":
            return np.array([max(1, len(context.base.piece_bytes(index))) for index in ids], np.float64)
        if self.weights == "uniform":
            return np.ones(len(ids))
        halving = 0.5 ** np.arange(len(ids))
        return halving if self.weights == "first" else halving[::-1]

    def build(self, tables: Tables, context: RowContext) -> dict[str, Rows]:
        weights = [self._weights(ids, context) for ids in context.pieces]
        rows = {}
        for name, table in tables.items():
            rows[name] = np.empty((len(weights), table.shape[1]), np.float32)
            for index, (ids, weight) in enumerate(zip(context.pieces, weights, strict=True)):
                parts = table[list(ids)].astype(np.float64)
                row = (weight / weight.sum()) @ parts
                if self.calibrated:
                    row *= np.linalg.norm(parts, axis=1).mean() / max(np.linalg.norm(row), 1e-12)
                rows[name][index] = row
        return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean of the whole table, for every new piece (Hewitt 2021, "Initializing new word embeddings")."""

    def build(self, tables: Tables, context: RowContext) -> dict[str, Rows]:
        means = {name: mean_of(table).astype(np.float32) for name, table in tables.items()}
        return {name: np.tile(mean, (len(context.pieces), 1)) for name, mean in means.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random:
    """Normal with the table's mean and covariance (Hewitt 2021)."""

    def build(self, tables: Tables, context: RowContext) -> dict[str, Rows]:
        generator = np.random.default_rng(context.seed)
        rows = {}
        for name, table in tables.items():
            mean = mean_of(table)
            covariance = _covariance(table, mean)
            drawn = generator.multivariate_normal(mean, covariance, size=len(context.pieces), method="cholesky")
            rows[name] = drawn.astype(np.float32)
        return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Focus:
    """Each new row a combination of rows of pieces that old and new text share, weighted by the sparsemax of their
    similarity in static vectors (Dobler & de Melo 2023, arXiv 2305.14481).

    The vectors are trained on the new domain, cut by the extended tokenizer: positive pointwise mutual information
    within `window` tokens, reduced to `width` dimensions (Levy & Goldberg 2014), instead of the paper's fastText. A
    piece that is too rare for a vector starts as its pieces' mean.
    """

    width: int = 200
    window: int = 5
    min_count: int = 5

    def build(self, tables: Tables, context: RowContext) -> dict[str, Rows]:
        vectors = static_vectors(context.extended, context.texts(), self.width, self.window, self.min_count)
        first = context.base.size
        shared = np.array(sorted(index for index in vectors if index < first))
        new = [index - first for index in sorted(vectors) if index >= first]
        rows = SubwordMean().build(tables, context)
        if not len(shared) or not new:
            return rows
        old = np.stack([vectors[index] for index in shared])
        known = {name: table[shared].astype(np.float64) for name, table in tables.items()}
        for some in _in_parts(new):
            weights = sparsemax(np.stack([vectors[first + index] for index in some]) @ old.T)
            for name, table in known.items():
                rows[name][some] = (weights @ table).astype(np.float32)
        return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wechsel:
    """Each new row a combination of the rows of the old pieces nearest to it in bilingual word vectors (Minixhofer et
    al. 2022, arXiv 2112.06598).

    `source` and `target`: files in fastText's .vec format ("word 0.1 0.2 ..."), aligned in one space, of the old and
    the new language. A piece's vector is the mean of those of the words it occurs in.
    """

    source: str
    target: str
    neighbours: int = 10
    temperature: float = 0.1

    def build(self, tables: Tables, context: RowContext) -> dict[str, Rows]:
        old = word_vectors(Path(self.source), context.base)
        new = word_vectors(Path(self.target), context.extended)
        first = context.base.size
        known = np.array(sorted(old))
        wanted = [index - first for index in sorted(new) if index >= first]
        if not len(known) or not wanted:
            raise UserError(
                f"{self.source} and {self.target} hold no words with old and new pieces: are they the two languages?"
            )
        keys, queries = np.stack([old[i] for i in known]), np.stack([new[first + i] for i in wanted])
        if keys.shape[1] != queries.shape[1]:
            raise UserError(
                f"{self.source} has vectors of {keys.shape[1]}, {self.target} of {queries.shape[1]} numbers"
            )
        rows = SubwordMean().build(tables, context)
        for some in _in_parts(range(len(wanted))):
            similarity = queries[some] @ keys.T
            nearest = np.argsort(-similarity, axis=1)[:, : self.neighbours]
            scores = np.take_along_axis(similarity, nearest, 1) / self.temperature
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            for name, table in tables.items():
                near = table[known[nearest]].astype(np.float64)
                rows[name][[wanted[each] for each in some]] = np.einsum("nk,nkd->nd", weights, near)
        return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distilled:
    """Rows fitted so that the frozen model, reading the new pieces, has the hidden states it has reading the old ones,
    and gives each new piece the probability that it gives its old pieces in a row (after AweDist, Dobler et al. 2025,
    arXiv 2505.20133). They start as their pieces' mean.

    `steps` of `batch_size` rows of `sequence_length` new tokens of the new domain's training text, with Adam, at
    `learning_rate` (None: `FITTED_STEP` of the size of the base's rows).
    """

    steps: int = 50
    batch_size: int = 2
    sequence_length: int = 128
    learning_rate: float | None = None
    probability_weight: float = 0.1

    def build(self, tables: Tables, context: RowContext) -> dict[str, Rows]:
        rate = self.learning_rate or FITTED_STEP * size_of_rows(tables.values())
        settings = dataclasses.replace(self, learning_rate=rate)
        return distilled_rows(settings, SubwordMean().build(tables, context), context)


InitRows = SubwordMean | Mean | Random | Focus | Wechsel | Distilled

# Names for a command line; Wechsel needs files and is none of them.
NAMED_ROWS: dict[str, InitRows] = {
    "random": Random(),
    "mean": Mean(),
    "subword-mean": SubwordMean(),
    "subword-mean-length": SubwordMean(weights="length"),
    "subword-mean-first": SubwordMean(weights="first"),
    "subword-mean-last": SubwordMean(weights="last"),
    "subword-mean-calibrated": SubwordMean(calibrated=True),
    "focus": Focus(),
    "distilled": Distilled(),
}
# Made from a corpus as well as from the old rows.
NEEDS_TEXT = (Focus, Wechsel, Distilled)


def mean_of(table: Table) -> Float[np.ndarray, "D"]:
    """The mean row, summed in float64, in parts."""
    return np.sum([part.sum(0) for part in _parts_of(table)], axis=0) / len(table)


def size_of_rows(tables: Iterable[Table]) -> float:
    """The root mean square of a row: the median of some rows, and of several tables the geometric mean."""
    sizes = []
    for table in tables:
        firsts = np.linspace(0, max(0, len(table) - _STRETCH), _STRETCHES).astype(int)
        rows = np.concatenate([np.asarray(table[first : first + _STRETCH], np.float64) for first in firsts])
        sizes.append(np.median(np.sqrt(np.mean(rows**2, axis=1))))
    return float(np.exp(np.mean(np.log(sizes))))


def _parts_of(table: Table) -> Iterator[Float[np.ndarray, "N D"]]:
    """Rows in float64, some at a time."""
    for start in range(0, len(table), 4096):
        yield np.asarray(table[start : start + 4096], np.float64)


def _covariance(table: Table, mean: np.ndarray) -> Float[np.ndarray, "D D"]:
    """In parts: numpy's would hold the table in float64 twice, 10 GB for 150,000 rows of 4,096."""
    products = np.zeros((len(mean), len(mean)))
    for part in _parts_of(table):
        apart = part - mean
        products += apart.T @ apart
    return products / (len(table) - 1)


def _in_parts(rows: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield list(rows[start : start + ROWS_AT_ONCE])


def sparsemax(scores: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """The nearest points of the simplex (Martins & Astudillo 2016, arXiv 1602.02068)."""
    ordered = -np.sort(-scores, axis=1)
    sums = ordered.cumsum(1) - 1
    counts = np.arange(1, scores.shape[1] + 1)
    kept = (ordered * counts > sums).sum(1)
    threshold = sums[np.arange(len(scores)), kept - 1] / kept
    return np.maximum(scores - threshold[:, None], 0)
