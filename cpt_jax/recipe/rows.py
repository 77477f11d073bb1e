"""The embedding grown: a row for every new piece, and the probe that tells which rows learn best."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cpt_jax.adapt import Embeddings
from cpt_jax.checkpoint.hf import load, named_ids, widest
from cpt_jax.checkpoint.hf_write import save
from cpt_jax.core.errors import UserError
from cpt_jax.core.lazy import LazyArray, rows_of
from cpt_jax.core.precision import Precision
from cpt_jax.core.progress import progress, say
from cpt_jax.core.tree import Tree, flatten, partition, unflatten
from cpt_jax.data.loader import Loader
from cpt_jax.data.prepare import prepare
from cpt_jax.evaluate.bits_per_byte import PackedDocuments, bits_per_byte, pack_documents
from cpt_jax.models.vocab_table import TABLES
from cpt_jax.optim.optimizer import AdamW
from cpt_jax.optim.schedules import Constant
from cpt_jax.recipe.model import Model
from cpt_jax.sharding.hardware import fastest_type
from cpt_jax.sharding.mesh import make_mesh
from cpt_jax.training.program import Settings
from cpt_jax.training.step import Controls
from cpt_jax.vocab.distil import FrozenModel
from cpt_jax.vocab.extend import old_segmentation
from cpt_jax.vocab.init_rows import ROWS_STEP, InitRows, RowContext, Rows, Table, mean_of, size_of_rows
from cpt_jax.vocab.selection import sampled
from cpt_jax.vocab.tokenizer import Tokenizer

NewRows = dict[str, Rows]

# Of a larger corpus, whole documents chosen by hash, as many as pieces are learnt from by default: they are held in memory.
ROWS_BYTES = 200_000_000


def _quickest() -> Precision:
    """For the short trainings behind new rows, which leave nothing in this type. Not float16, which needs a loss that is a sum
    over tokens (`Precision`): what is fitted is a mean."""
    return Precision(compute="bfloat16" if fastest_type() == "bfloat16" else "float32")


class Growth:
    """A base model about to get a row for every piece of an extended tokenizer; the old rows stay bit for bit.

    Args:
      texts: training text of the new domain, for rows that are made from it.

    Raises:
      UserError: the tokenizers do not fit the model, or each other.
    """

    def __init__(
        self, model: Path, tokenizer: Path, seed: int = 0, texts: Callable[[], Iterable[str]] = lambda: ()
    ) -> None:
        config, weights, self._hf_config = load(model)
        self.base, self.extended, self.seed, self.texts = Tokenizer(model), Tokenizer(tokenizer), seed, texts
        if self.extended.size < self.base.size:
            raise UserError(
                f"the tokenizer in {tokenizer} has {self.extended.size:,} pieces, fewer than the model's {self.base.size:,}"
            )
        _check_named_ids(model, self.base)
        _tell_rows(config.vocab_size, self.base.size)
        flat = flatten(weights)
        self.tables = {
            name: _fitted(name, flat[f"{name}/base"], self.base.size) for name in TABLES if f"{name}/base" in flat
        }
        self._weights = flat | {f"{name}/base": table for name, table in self.tables.items()}
        self._config = dataclasses.replace(config, vocab_size=self.base.size)
        self.pieces = old_segmentation(self.base, self.extended)

    def _frozen(self) -> FrozenModel:
        precision = _quickest()
        plain = Model(config=self._config, weights=unflatten(self._weights), hf_config={})
        return FrozenModel(self._config, plain.on_device(precision), precision.dtype)

    def rows(self, initial_rows: InitRows, seed: int | None = None) -> NewRows:
        """New rows [N, D] of each table, float32."""
        if not self.pieces:
            return {}
        context = RowContext(
            pieces=self.pieces,
            base=self.base,
            extended=self.extended,
            texts=lambda: sampled(self.texts(), ROWS_BYTES)[0],
            model=self._frozen,
            seed=self.seed if seed is None else seed,
        )
        tables = {n: t if isinstance(t, LazyArray) else np.asarray(t, np.float32) for n, t in self.tables.items()}
        return initial_rows.build(tables, context)

    def model(self, rows: NewRows) -> Model:
        """The grown model; its new rows are leaves of their own."""
        grown = self._weights | {f"{name}/new": table for name, table in rows.items()}
        config = dataclasses.replace(self._config, new_rows=len(self.pieces))
        return Model(config=config, weights=unflatten(grown), hf_config=self._hf_config)

    def save(self, rows: NewRows, out: Path) -> None:
        """Writes the grown model, in the base's own type (float32 where its weights have several), with the extended
        tokenizer."""
        model = self.model(rows)
        save(
            out,
            model.config,
            model.weights,
            self._hf_config,
            self.extended.directory,
            origin=self.base.directory,
            dtype=widest(leaf.dtype for leaf in self._weights.values()),
        )


def _check_named_ids(directory: Path, tokenizer: Tokenizer) -> None:
    """Refuses a model whose files name a token that its tokenizer has not: that row would become a new piece's (text
    would end at it, or be taken for padding), or be cut off (of a padding beyond the table torch makes no embedding)."""
    for path, name, ids in named_ids(directory):
        if unknown := [each for each in ids if each >= tokenizer.size]:
            raise UserError(
                f"{path} names {unknown[0]} as {name}, but the tokenizer has {tokenizer.size:,} pieces, and new ones come "
                "behind them: take it out of that file, or add that token to the tokenizer"
            )


def _tell_rows(rows: int, pieces: int) -> None:
    if rows > pieces:
        say(
            f"model: {rows - pieces:,} rows of the embedding belong to no piece of the tokenizer: new pieces take their places"
        )
    elif rows < pieces:
        say(
            f"model: the tokenizer has {pieces - rows:,} pieces more than the embedding has rows: they start as its mean"
        )


def _fitted(name: str, table: LazyArray, rows: int) -> Table:
    """The first `rows` rows; those that the table lacks are its mean.

    Of the layers' inputs, rows are read when they are asked for: E2B's are 4.7 GB, and as much again in float32 twice.
    """
    if table.shape[0] >= rows:
        return rows_of(table, 0, rows, rows) if name == "layer_embed" else table[:rows]
    mean = mean_of(table).astype(table.dtype)
    return np.concatenate([table, np.tile(mean, (rows - table.shape[0], 1))])


def grow_model(
    model: Path,
    tokenizer: Path,
    initial_rows: InitRows,
    seed: int,
    out: Path,
    texts: Callable[[], Iterable[str]] = lambda: (),
) -> None:
    """Writes the model with a row for every piece of the extended tokenizer; see `Growth`."""
    growth = Growth(model, tokenizer, seed, texts)
    growth.save(growth.rows(initial_rows), out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """A short training of the new rows alone, everything else frozen: what rows are worth shows after some steps, not
    before the first. Evaluated after each of `steps`, which ascend."""

    steps: tuple[int, ...] = (0, 50)
    batch_size: int = 2
    sequence_length: int = 256
    optimizer: AdamW | None = None
    precision: Precision = dataclasses.field(default_factory=_quickest)

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 0 or list(self.steps) != sorted(set(self.steps)):
            raise UserError(f"probe steps {self.steps}: give ascending numbers from 0 on")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probed:
    """One candidate's bits per byte of the held-out text, by steps of training, and the seconds its rows took."""

    name: str
    bits_per_byte: dict[int, float]
    seconds: float


class RowProbe:
    """Candidates for the new rows, trained on the same batches and evaluated on the same held-out text."""

    def __init__(self, growth: Growth, heldout: Sequence[str], probe: Probe) -> None:
        self.growth, self.probe = growth, probe
        self._heldout: PackedDocuments = pack_documents(growth.extended, heldout, probe.sequence_length)
        zeros = {name: np.zeros((len(growth.pieces), t.shape[1]), np.float32) for name, t in growth.tables.items()}
        self._model = growth.model(zeros).for_training(jax.default_backend())
        trains = Embeddings(rows="new").trains
        trainable, self._frozen = partition(self._model.on_device(probe.precision), trains)
        rate = ROWS_STEP * size_of_rows(growth.tables.values())
        optimizer = probe.optimizer or AdamW(learning_rate=rate, new_rows_epsilon=1e-3)
        self._rate = Constant().build(optimizer.learning_rate, max(probe.steps))
        self._program = Settings(
            network=self._model.network,
            trains=frozenset(flatten(trainable)),
            names=("probe",),
            optimizer=optimizer,
            compute=probe.precision.compute,
            mesh=make_mesh(jax.devices()[:1]),
        ).program()

    def batches(self, seed: int) -> list[dict[str, np.ndarray]]:
        """The batches that every candidate sees."""
        probe, extended, count = self.probe, self.growth.extended, max(self.probe.steps)
        if not count:
            return []
        # Far more text than the steps take, and yet not a whole large corpus.
        texts, _, _ = sampled(self.growth.texts(), 64 * count * probe.batch_size * probe.sequence_length)
        with tempfile.TemporaryDirectory() as directory:
            prepare("probe", iter(texts), extended, Path(directory))
            loader = Loader(
                {"probe": 1.0},
                {"probe": Path(directory)},
                sequence_length=probe.sequence_length,
                batch_size=probe.batch_size,
                start_id=extended.start_id,
                end_id=extended.end_id,
                tokenizer=extended.fingerprint,
                seed=seed,
            )
            return [next(loader) for _ in range(count)]

    def run(self, name: str, rows: NewRows, batches: Sequence[dict[str, np.ndarray]], seconds: float = 0.0) -> Probed:
        """Trains these rows on the batches and measures them."""
        trainable = unflatten({f"{table}/new": jnp.asarray(new, jnp.float32) for table, new in rows.items()})
        state = self._program.begin(trainable)
        found: dict[int, float] = {}
        with progress(f"probe {name}", max(1, len(batches)), "steps") as shown:
            for number in range(len(batches) + 1):
                if number in self.probe.steps:
                    found[number] = self._measured(state.trainable)
                if number < len(batches):
                    controls = Controls(np.float32(self._rate(number)))
                    state, _ = self._program.step(state, self._frozen, {}, batches[number], controls)
                    shown.advance(1)
        return Probed(name=name, bits_per_byte=found, seconds=seconds)

    def _measured(self, trainable: Tree) -> float:
        precision = self.probe.precision
        low = jax.tree.map(lambda leaf: leaf.astype(precision.dtype), trainable)
        weights = unflatten(flatten(self._frozen) | flatten(low))
        result = bits_per_byte(self._model.network, weights, self._heldout, batch_size=4, precision=precision)
        return result.bits_per_byte


def best_rows(
    growth: Growth, candidates: Mapping[str, InitRows], heldout: Sequence[str], probe: Probe
) -> tuple[NewRows, list[Probed]]:
    """The rows of the candidate that is best after the last step, and every candidate's figures, the best first."""
    prober = RowProbe(growth, heldout, probe)
    batches = prober.batches(growth.seed)
    made: dict[str, NewRows] = {}
    results = []
    for name, candidate in candidates.items():
        started = time.monotonic()
        made[name] = growth.rows(candidate)
        results.append(prober.run(name, made[name], batches, time.monotonic() - started))
    results.sort(key=lambda result: result.bits_per_byte[max(probe.steps)])
    return made[results[0].name], results
