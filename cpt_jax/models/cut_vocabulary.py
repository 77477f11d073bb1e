"""A loss over the vocabulary on a mesh: which axes cut what, and the sums along them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from cpt_jax.sharding.rules import RULES, partition_spec


class Devices(NamedTuple):
    """Mesh axes: those that cut the tokens; that which cuts the vocabulary, and which tables it cuts; that along which
    a table's gradient is given back cut, in its width."""

    tokens: tuple[str, ...] = ()
    vocabulary: str = ""
    cut: tuple[bool, ...] = (False, False)
    width: str = ""

    def sum_of_tokens(self, part: Array) -> Array:
        return jax.lax.psum(part, self.tokens) if self.tokens else part

    def table_gradient(self, part: Array) -> Array:
        """The sum of the devices' gradients of a table [V, D]."""
        if not self.width:
            return self.sum_of_tokens(part)
        part = jax.lax.psum_scatter(part, self.width, scatter_dimension=1, tiled=True)
        others = tuple(axis for axis in self.tokens if axis != self.width)
        return jax.lax.psum(part, others) if others else part

    def sum_of_tables(self, parts: Sequence[Array]) -> Array:
        """Of a number for each table, their sum over all rows."""
        return self._over(parts, jax.lax.psum, jnp.add)

    def largest(self, parts: Sequence[Array]) -> Array:
        return self._over(parts, jax.lax.pmax, jnp.maximum)

    def _over(self, parts: Sequence[Array], across: Callable, join: Callable) -> Array:
        own = [part for part, cut in zip(parts, self.cut, strict=False) if cut]
        joined = [across(functools.reduce(join, own), self.vocabulary)] if own else []
        return functools.reduce(join, [*joined, *(part for part, cut in zip(parts, self.cut, strict=False) if not cut)])

    def rows(self, table: Array, number: int) -> Int[Array, "V"]:
        """Which rows of its whole table a device holds."""
        own = jnp.arange(table.shape[0])
        return own + jax.lax.axis_index(self.vocabulary) * table.shape[0] if self.cut[number] else own


# The logical axes of the base's table and of that of new rows.
TABLES = (("vocab", "embed"), ("new_vocab", "embed"))


class Specs(NamedTuple):
    """How arrays enter and leave each device: hidden states, what is of tokens, tables, and tables' gradients."""

    hidden: PartitionSpec
    tokens: PartitionSpec
    tables: tuple[PartitionSpec, ...]
    gradients: tuple[PartitionSpec, ...]


def on_mesh(hidden: Any, tables: Sequence[Any]) -> tuple[Devices, Specs] | None:
    """Of hidden states [B, S, D] and tables [V, D] on the mesh that is set; None where nothing is cut."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or hidden.ndim != 3:
        return None
    rows = partition_spec(("batch", "sequence", "hidden"), hidden.shape, mesh)
    axes = tuple(axis for part in rows for axis in _names(part))
    names = [partition_spec(names, table.shape, mesh) for names, table in zip(TABLES, tables, strict=False)]
    vocabulary = next((_names(spec[0])[0] for spec in names if spec[0] is not None), "")
    width = RULES["embed"][0] if names[0][1] is not None and RULES["embed"][0] in axes else ""
    devices = Devices(axes, vocabulary, tuple(spec[0] is not None for spec in names), width)
    whole = tuple(PartitionSpec(spec[0], None) for spec in names)
    gradients = tuple(PartitionSpec(spec[0], width or None) for spec in names)
    return devices, Specs(rows, PartitionSpec(*rows[:2]), whole, gradients)


def _names(part: Any) -> tuple[str, ...]:
    """Of an axis of an array, the mesh axes that cut it."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)
