"""Rows of mixed, packed documents as a dataset of grain's, whose state says where it stands in every domain."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import grain
import numpy as np

from cpt_jax.core.config import from_json, to_json
from cpt_jax.data.documents import Documents, Reader
from cpt_jax.data.mixture import Mixture, Raised, shares_of
from cpt_jax.data.packing import OPEN_ROWS, Packing, Rows, filled, gather, in_order, placed

# Documents of several domains in a row, or each row of one domain.
PackDomains = Literal["together", "apart"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed:
    """What is mixed, and how it is packed.

    Args:
      tokens: that each domain has.
      total: rows of the whole stage, which a mixture that changes is spread over.
      most: documents of a row.
      epochs: how often each domain is read; None: without end.
    """

    mixture: Mixture
    documents: Mapping[str, Documents]
    tokens: Mapping[str, int]
    sequence_length: int
    batch_size: int
    total: int
    most: int
    epochs: Mapping[str, int | None]
    packing: Packing
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.documents)

    def limits(self) -> dict[str, Any]:
        """What holds for the rows that are packed next, as JSON: those that are packed already keep theirs."""
        return {"most": self.most, "epochs": dict(self.epochs)}

    def shares(
        self, names: Sequence[str], mixture: Mixture, raised: Raised | None, first: int, count: int
    ) -> np.ndarray:
        """[count, domains], of the rows from `first` on."""
        shares = shares_of(mixture, names, self.tokens)
        if raised is not None:
            shares = raised.over(shares, names)
        return shares((first + np.arange(count)) / max(self.total, 1))


class MixedRows(grain.IterDataset):
    """Rows [sequence_length], those of a batch filled up with empty ones where the text ends."""

    def __init__(self, mixed: Mixed, domains: PackDomains) -> None:
        super().__init__()
        self._mixed, self._domains = mixed, domains

    def __iter__(self) -> grain.DatasetIterator:
        return _Together(self._mixed) if self._domains == "together" else _Apart(self._mixed)


class _Group:
    """Rows that are packed at a time. Its state is where it began: from there it is packed again."""

    def __init__(self, mixed: Mixed, names: Sequence[str]) -> None:
        self._mixed = mixed
        self._readers = {name: Reader(mixed.documents[name]) for name in names}
        self.rows: Rows = {}
        self.order: list[int] = []
        self.next, self.number, self.limits = 0, 0, mixed.limits()
        self.began = self.positions()

    def positions(self) -> dict[str, list[int]]:
        return {name: reader.position() for name, reader in self._readers.items()}

    def go(self, positions: Mapping[str, Sequence[int]]) -> None:
        for name, reader in self._readers.items():
            reader.go(positions.get(name, (0, 0)))

    def pack(self, names: Sequence[str], credit: list[float], shares: np.ndarray, limits: dict[str, Any]) -> bool:
        """The next rows, of these domains; False: there is no text any more. Changes `credit`."""
        mixed, before, most = self._mixed, np.array(credit), limits["most"]
        self.began, self.next, self.limits = self.positions(), 0, limits
        readers = [self._readers[name] for name in names]
        for name, reader in zip(names, readers, strict=True):
            reader.end_after(limits["epochs"][name])
        pieces = gather(readers, credit, shares, mixed.sequence_length, mixed.packing, most)
        self.order = []
        if not pieces.lengths:
            return False
        rows = placed(pieces.lengths, mixed.sequence_length, mixed.packing, most)
        numbers = [mixed.names.index(name) for name in names]
        self.rows = filled(pieces, [reader.taken() for reader in readers], rows, numbers, mixed.sequence_length)
        generator = np.random.default_rng([mixed.seed, self.number, zlib.crc32(names[0].encode())])
        tokens = np.zeros((len(self.rows["inputs"]), len(readers)))
        np.add.at(tokens, (rows, pieces.domains), pieces.lengths)
        as_they_come = mixed.packing == "none"
        self.order = list(range(len(tokens))) if as_they_come else in_order(tokens, shares, before, generator)
        return True

    def take(self) -> Rows:
        row = self.order[self.next]
        self.next += 1
        return {field: array[row] for field, array in self.rows.items()}


class _RowIterator(grain.DatasetIterator):
    """What both orders of packing and mixing share."""

    def __init__(self, mixed: Mixed) -> None:
        super().__init__()
        self._mixed = mixed
        self._row, self._ended = 0, False
        # Tokens that each domain is behind its share.
        self._credit = dict.fromkeys(mixed.names, 0.0)
        self._raised: Raised | None = None

    def __next__(self) -> Rows:
        if not self._ended:
            if (row := self._next_row()) is not None:
                self._row += 1
                return row
            self._ended = True
        if self._row % self._mixed.batch_size == 0:
            raise StopIteration
        self._row += 1
        return self._empty()

    def _next_row(self) -> Rows | None:
        raise NotImplementedError

    def _empty(self) -> Rows:
        length = self._mixed.sequence_length
        rows = {name: np.zeros(length, np.int32) for name in ("inputs", "targets", "positions", "segment_ids")}
        return rows | {"domains": np.zeros(length, np.int32), "weights": np.zeros(length, np.float32)}

    def _shared_state(self) -> dict[str, Any]:
        return {"row": self._row, "raised": to_json(self._raised)}

    def _set_shared(self, state: dict[str, Any]) -> None:
        # Whether the text has ended is seen again: more of it may be read now.
        self._row, self._ended = state["row"], False
        self._credit = dict.fromkeys(self._mixed.names, 0.0)
        self._raised = from_json(Raised | None, state["raised"], "raised")


class _Together(_RowIterator):
    """Documents are mixed, then packed. The group at hand is of the mixture that held when it was begun; the one that
    follows, of that which holds now."""

    def __init__(self, mixed: Mixed) -> None:
        super().__init__(mixed)
        self._group = _Group(mixed, mixed.names)
        self._begin = self._at_hand()

    def _at_hand(self) -> dict[str, Any]:
        """What the next group follows from, but for the documents."""
        return {
            "row": self._row,
            "credit": dict(self._credit),
            "mixture": to_json(self._mixed.mixture),
            "raised": to_json(self._raised),
            "limits": self._mixed.limits(),
        }

    def _next_row(self) -> Rows | None:
        group = self._group
        if group.next == len(group.order):
            self._begin = self._at_hand()
            group.number += 1
            if not self._pack():
                return None
        return group.take()

    def _pack(self) -> bool:
        begin = self._begin
        # Those that were mixed then, in an order of its own: another mixture may name them in another.
        names = sorted(begin["credit"])
        mixture = from_json(Mixture, begin["mixture"], "mixture")
        raised = from_json(Raised | None, begin["raised"], "raised")
        shares = self._mixed.shares(names, mixture, raised, begin["row"], OPEN_ROWS)
        credit = [begin["credit"][name] for name in names]
        there = self._group.pack(names, credit, shares, begin["limits"])
        self._credit |= zip(names, credit, strict=True)
        return there

    def get_state(self) -> dict[str, Any]:
        group = self._group
        return self._shared_state() | {
            "begin": self._begin,
            "positions": group.began,
            "group": group.number,
            "taken": group.next,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._set_shared(state)
        group, self._begin = self._group, state["begin"]
        group.go(state["positions"])
        group.number = state["group"]
        group.rows, group.order, group.next = {}, [], 0
        group.began = group.positions()
        # Before the first group there is none to pack again.
        if state["group"]:
            self._pack()
            group.next = state["taken"]


class _Apart(_RowIterator):
    """Each domain packs rows of its own; a row comes from the domain that is furthest behind its share."""

    def __init__(self, mixed: Mixed) -> None:
        super().__init__(mixed)
        self._groups = {name: _Group(mixed, [name]) for name in sorted(mixed.names)}
        self._over: set[str] = set()
        # Of the rows from a number on.
        self._shares: tuple[int, np.ndarray] | None = None

    def _next_row(self) -> Rows | None:
        while len(self._over) < len(self._groups):
            due = self._due()
            name = max(due, key=lambda each: self._credit[each])
            group = self._groups[name]
            if group.next == len(group.order):
                group.number += 1
                if not group.pack([name], [0.0], np.ones((OPEN_ROWS, 1)), self._mixed.limits()):
                    self._over.add(name)
                    continue
            row = group.take()
            count = int((row["segment_ids"] > 0).sum())
            for each, share in due.items():
                self._credit[each] += share * count
            self._credit[name] -= count
            return row
        return None

    def _due(self) -> dict[str, float]:
        """Shares of the domains that have text and are to have some."""
        first = self._row - self._row % OPEN_ROWS
        if self._shares is None or self._shares[0] != first:
            mixture = self._mixed.mixture
            names = list(self._groups)
            self._shares = first, self._mixed.shares(names, mixture, self._raised, first, OPEN_ROWS)
        row = self._shares[1][self._row - first]
        living = [(name, float(share)) for name, share in zip(self._groups, row, strict=True) if name not in self._over]
        given = [(name, share) for name, share in living if share > 0] or [(name, 1.0) for name, _ in living]
        whole = sum(share for _, share in given)
        return {name: share / whole for name, share in given}

    def get_state(self) -> dict[str, Any]:
        groups = {
            name: {"position": group.began[name], "group": group.number, "taken": group.next, "limits": group.limits}
            for name, group in self._groups.items()
        }
        return self._shared_state() | {"credit": dict(self._credit), "groups": groups}

    def set_state(self, state: dict[str, Any]) -> None:
        self._set_shared(state)
        self._over, self._shares = set(), None
        self._credit |= state["credit"]
        for name, group in self._groups.items():
            found = state["groups"].get(name, {"position": [0, 0], "group": 0, "taken": 0})
            group.go({name: found["position"]})
            group.number, group.order, group.next = found["group"], [], 0
            group.began = group.positions()
            if found["group"]:
                group.pack([name], [0.0], np.ones((OPEN_ROWS, 1)), found["limits"])
                group.next = found["taken"]
