"""The loader: prepared domains to batches, in an order that the seed decides, and that continues exactly from a
saved state."""

import weakref
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import grain
import numpy as np

from cpt_jax.core.config import from_json, to_json
from cpt_jax.core.errors import UserError
from cpt_jax.data.documents import Documents, LongDocuments
from cpt_jax.data.mixture import Mixture, Raised, changes, check_mixture, domains_of
from cpt_jax.data.packing import Packing, documents_in_a_row
from cpt_jax.data.prepare import Manifest, read_manifest
from cpt_jax.data.records import Records, Unreadable
from cpt_jax.data.rows import Mixed, MixedRows, PackDomains

Batch = dict[str, np.ndarray]
# Batches that a thread has ready.
PREFETCH = 4


class Loader:
    """Batches without end (or until all domains were read `max_epochs` times), each domain shuffled anew every epoch.

    A batch holds inputs, targets, positions, segment_ids, domains (int32 [batch_size, sequence_length]; domains
    index the mixture's names) and weights (float32, 0 on padding and where nothing is to be learnt). Every process builds the same batches,
    of which its devices take what is theirs: the order of documents does not depend on how many there are, nor on the
    mesh. No row has more than `documents`, its padding counted.

    A thread reads ahead; `close()` ends it. A domain that was read as often as `max_epochs` says gives its share to the others. Documents that cannot be read
    stop it, or are left out (`unreadable`) and counted.

    Args:
      steps: batches of the stage, which a mixture that changes is spread over.

    Raises:
      UserError: shares that are no mixture, or a domain that is not prepared, or was prepared with another tokenizer.
    """

    def __init__(
        self,
        mixture: Mixture,
        directories: Mapping[str, Path],
        *,
        sequence_length: int,
        batch_size: int,
        start_id: int,
        end_id: int,
        tokenizer: str,
        seed: int,
        steps: int | None = None,
        packing: Packing = "best fit",
        pack_domains: PackDomains = "together",
        long_documents: LongDocuments = "split",
        max_epochs: Mapping[str, int] | None = None,
        unreadable: Unreadable = "stop",
    ) -> None:
        check_mixture(mixture)
        # All domains have to be limited for that; one whose share is 0 may be left.
        self.may_end = bool(max_epochs)
        if steps is None and changes(mixture):
            raise ValueError("a mixture that changes needs the number of steps")
        self.names, self.sequence_length, self.batch_size = domains_of(mixture), sequence_length, batch_size
        manifests = {name: _manifest(directories, name, tokenizer) for name in self.names}
        self.records = {name: manifest.records for name, manifest in manifests.items()}
        self.tokens = {name: manifest.tokens for name, manifest in manifests.items()}
        self._sources = {name: Records(directories[name], manifests[name], unreadable) for name in self.names}
        documents = {
            name: Documents(
                self._sources[name],
                # By its name: it keeps its order if another domain joins the mixture.
                seed=(seed * 1_000_003 + zlib.crc32(name.encode())) % 2**32,
                frame=(start_id, end_id) if manifest.format == "text" else None,
                sequence_length=sequence_length,
                mean_tokens=manifest.tokens / max(manifest.records, 1),
                long_documents=long_documents,
            )
            for name, manifest in manifests.items()
        }
        # Of the domain with the shortest documents: whatever the shares are, or come to be.
        rate = max(self.records[name] / max(self.tokens[name], 1) for name in self.names)
        # Without packing: a document, and its padding.
        self.documents = 2 if packing == "none" else documents_in_a_row(sequence_length, rate)
        mixed = Mixed(
            mixture=mixture,
            documents=documents,
            tokens=self.tokens,
            sequence_length=sequence_length,
            batch_size=batch_size,
            total=(steps or 0) * batch_size,
            most=self.documents - 1,
            epochs={name: (max_epochs or {}).get(name) for name in self.names},
            packing=packing,
            seed=seed,
        )
        self._mixed = mixed
        batches = MixedRows(mixed, pack_domains).batch(batch_size, drop_remainder=True)
        self._iterator = iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=PREFETCH))
        # Before the interpreter takes grain's modules apart.
        self.close = weakref.finalize(self, self._iterator.close)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def unreadable(self) -> dict[str, int]:
        """Documents met so far that could not be read and were left out, by domain; only domains that have some."""
        return {name: len(source.skipped) for name, source in self._sources.items() if source.skipped}

    def raised(self) -> Raised | None:
        """What `raise_shares` was told."""
        return from_json(Raised | None, _rows_state(self.state()["rows"])["raised"], "raised")

    def raise_shares(self, raised: Raised) -> None:
        """From the rows on that are packed next, some domains have more than the mixture gives; part of the state."""
        state = self.state()
        _rows_state(state["rows"])["raised"] = to_json(raised)
        self.restore(state)

    def shares_now(self) -> dict[str, float]:
        """Each domain's share of the rows that are packed next, with what was raised."""
        row = _rows_state(self.state()["rows"])["row"]
        shares = self._mixed.shares(self.names, self._mixed.mixture, self.raised(), row, 1)
        return dict(zip(self.names, shares[0].tolist(), strict=True))

    def epochs(self) -> dict[str, float]:
        """How often each domain had been read where the rows at hand began: up to 64 are packed at a time."""
        state = _rows_state(self.state()["rows"])
        positions = state.get("positions") or {name: group["position"] for name, group in state["groups"].items()}
        return {name: positions[name][0] / max(self.records[name], 1) for name in self.names if name in positions}

    def state(self) -> dict:
        """Where it stands, as JSON."""
        sizes = {name: [self.records[name], self.tokens[name]] for name in self.names}
        return {"rows": self._iterator.get_state(), "sizes": sizes}

    def restore(self, state: dict) -> None:
        """Continues where `state` was taken: the same batches follow, bit for bit. With another mixture, no document
        is lost or repeated: the rows that are packed already are followed by others.

        Raises:
          UserError: the state is of a domain that is not mixed now, or that held other documents, or of another version.
        """
        for name, size in state["sizes"].items():
            if name not in self.names:
                raise UserError(
                    f"the stage was begun with {name!r} in its mixture, which has {', '.join(self.names)} now: keep it "
                    "(a Ramp or Phases may give it a share of 0), or remove the stage's directory to begin it anew"
                )
            if size != [self.records[name], self.tokens[name]]:
                raise UserError(
                    f"the stage was begun with {size[0]:,} documents of {name!r}, and there are {self.records[name]:,} "
                    "now: remove the stage's directory to begin it anew"
                )
        try:
            self._iterator.set_state(state["rows"])
        except KeyError as missing:
            raise UserError(
                f"where the stage was in its text another version of cpt_jax has written ({missing} is not there): end it with "
                "that one, or remove the stage's directory to begin it anew"
            ) from missing


def _rows_state(state: dict) -> dict:
    """That of the rows, in which grain's states of batches lie around it."""
    while "row" not in state:
        state = state["parent"]
    return state


def _manifest(directories: Mapping[str, Path], name: str, tokenizer: str) -> Manifest:
    manifest = read_manifest(directories[name])
    if manifest.tokenizer != tokenizer:
        raise UserError(
            f"{directories[name]} was prepared with another tokenizer: run `cpt data prepare` with this one"
        )
    if not manifest.trained_tokens:
        raise UserError(f"domain {name!r} has no text to train on: give it some, or leave it out of the mixture")
    return manifest
