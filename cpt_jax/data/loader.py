"""The loader: prepared domains to batches, in an order that the seed decides, and that continues exactly from a
saved state."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

from cpt_jax.core.errors import UserError
from cpt_jax.data.mixture import TokenMix, check_mixture
from cpt_jax.data.packing import Packing, SplitDocuments, documents_in_a_row, one_by_one, packed
from cpt_jax.data.prepare import Manifest, decode_record, read_manifest
from cpt_jax.data.records import Records, Unreadable

Batch = dict[str, np.ndarray]


class Loader:
    """Batches without end, each domain shuffled anew every epoch.

    A batch holds inputs, targets, positions, segment_ids, domains (int32 [batch_size, sequence_length]; domains
    index the mixture's names) and weights (float32, 0 on padding and where nothing is to be learnt). Every process builds the same batches,
    of which its devices take what is theirs: the order of documents does not depend on how many there are, nor on the
    mesh. No row has more than `documents`, its padding counted.

    Documents that cannot be read stop it, or are left out (`unreadable`) and counted.

    Raises:
      UserError: shares that are no mixture, or a domain that is not prepared, or was prepared with another tokenizer.
    """

    def __init__(
        self,
        mixture: Mapping[str, float],
        directories: Mapping[str, Path],
        *,
        sequence_length: int,
        batch_size: int,
        start_id: int,
        end_id: int,
        tokenizer: str,
        seed: int,
        packing: Packing = "first fit",
        unreadable: Unreadable = "stop",
    ) -> None:
        check_mixture(mixture)
        self.names, self.sequence_length = tuple(mixture), sequence_length
        self.records: dict[str, int] = {}
        self._sources: dict[str, Records] = {}
        pieces, documents_a_token = [], 0.0
        for index, name in enumerate(self.names):
            manifest = _manifest(directories[name], tokenizer)
            self._sources[name] = Records(directories[name], manifest, unreadable)
            source = _documents(self._sources[name], seed + index)
            self.records[name] = manifest.records
            documents_a_token += mixture[name] * manifest.records / max(manifest.tokens, 1)
            frame = (start_id, end_id) if manifest.format == "text" else None
            split = SplitDocuments(sequence_length, frame, index)
            pieces.append(grain.experimental.FlatMapIterDataset(source, split))
        mixed = TokenMix(pieces, tuple(mixture.values()))
        if packing == "none":
            # A document, and its padding.
            self.documents = 2
            rows = one_by_one(mixed, sequence_length)
        else:
            self.documents = documents_in_a_row(sequence_length, documents_a_token / sum(mixture.values()))
            rows = packed(mixed, sequence_length, self.documents, seed)
        self._iterator = iter(rows.batch(batch_size, drop_remainder=True))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def unreadable(self) -> dict[str, int]:
        """Documents met so far that could not be read and were left out, by domain; only domains that have some."""
        return {name: len(source.skipped) for name, source in self._sources.items() if source.skipped}

    def state(self) -> dict:
        """Where it stands, as JSON."""
        return self._iterator.get_state()

    def restore(self, state: dict) -> None:
        """Continues where `state` was taken: the same batches follow, bit for bit."""
        self._iterator.set_state(state)


def _manifest(directory: Path, tokenizer: str) -> Manifest:
    manifest = read_manifest(directory)
    if manifest.tokenizer != tokenizer:
        raise UserError(f"{directory} was prepared with another tokenizer: run `cpt data prepare` with this one")
    return manifest


def _documents(records: Any, seed: int) -> grain.IterDataset:
    documents = grain.MapDataset.source(records).seed(seed).shuffle().repeat().map(decode_record)
    # One thread reads ahead: the records are small, and order is kept.
    return documents.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=64))
