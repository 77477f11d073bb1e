"""Domains mixed by tokens: at every moment, the next document comes from the domain that is furthest behind its
share."""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from cpt_jax.core.errors import UserError


def check_mixture(mixture: Mapping[str, float]) -> None:
    """Raises UserError unless shares are positive and sum to one."""
    for name, share in mixture.items():
        if not share > 0:
            raise UserError(f"mixture: the share of {name!r} is {share}: give a number above 0, or leave it out")
    if abs((total := sum(mixture.values())) - 1) > 1e-6:
        raise UserError(
            f"mixture: the shares sum to {total:g}, not to 1 ({', '.join(f'{k} {v:g}' for k, v in mixture.items())})"
        )


class TokenMix(grain.IterDataset):
    """Pieces of several domains in one stream, exact in tokens to within one piece, whatever the lengths of their
    documents."""

    def __init__(self, parents: Sequence[grain.IterDataset], shares: Sequence[float]) -> None:
        super().__init__(list(parents))
        self._shares = tuple(shares)

    def __iter__(self) -> grain.DatasetIterator:
        return _TokenMixIterator([iter(parent) for parent in self._parents], self._shares)


class _TokenMixIterator(grain.DatasetIterator):
    def __init__(self, parents: list[Any], shares: tuple[float, ...]) -> None:
        super().__init__(parents)
        self._shares = np.asarray(shares)
        self._tokens = np.zeros(len(shares), np.int64)

    def __next__(self) -> dict[str, np.ndarray]:
        behind = self._shares * self._tokens.sum() - self._tokens
        chosen = int(np.argmax(behind))
        piece = next(self._parents[chosen])
        self._tokens[chosen] += len(piece["inputs"])
        return piece

    def get_state(self) -> dict[str, Any]:
        return {"parents": [parent.get_state() for parent in self._parents], "tokens": self._tokens.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        for parent, parent_state in zip(self._parents, state["parents"], strict=True):
            parent.set_state(parent_state)
        self._tokens = np.asarray(state["tokens"], np.int64)
