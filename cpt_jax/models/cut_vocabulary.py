"""The vocabulary's tables on a mesh: for the loss, which axes cut what, and the sums along them; and the lookup."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from cpt_jax.sharding.hardware import backend
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


def looked_up(
    table: Float[Array, "V D"], tokens: Int[Array, "B S"], kind: int, *, large: bool = False
) -> Float[Array, "B S D"]:
    """The tokens' rows of a table, of the kind that `TABLES` names.

    Of a `large` table that is frozen nothing is copied. On a mesh no device gathers the table: each looks up, in the part that it has, the tokens of all devices that have
    other parts of the width, and they exchange what they found.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _rows(table, tokens, large)
    where = partition_spec(TABLES[kind], table.shape, mesh)
    rows = partition_spec(("batch", "sequence"), tokens.shape, mesh)
    vocabulary, width = ((_names(part) or ("",))[0] for part in where)
    exchanged = width != "" and width in _names(rows[0])

    def part(table, tokens):
        if exchanged:
            tokens = jax.lax.all_gather(tokens, width, axis=0, tiled=True)
        own = tokens - (jax.lax.axis_index(vocabulary) * table.shape[0] if vocabulary else 0)
        found = _rows(table, jnp.clip(own, 0, table.shape[0] - 1), large)
        if vocabulary:
            here = (own >= 0) & (own < table.shape[0])
            found = jax.lax.psum(jnp.where(here[..., None], found, 0), vocabulary)
        if exchanged:
            return jax.lax.all_to_all(found, width, split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.all_gather(found, width, axis=2, tiled=True) if width else found

    return jax.shard_map(part, in_specs=(where, rows), out_specs=PartitionSpec(*rows, None), check_vma=False)(
        table, tokens
    )


def _rows(table: Float[Array, "V D"], tokens: Int[Array, "B S"], large: bool) -> Float[Array, "B S D"]:
    if large and table.dtype == jnp.bfloat16 and backend() == "cpu":
        return _rows_by_bits(table, tokens)
    return table.at[tokens].get(mode="promise_in_bounds")


@jax.custom_vjp
def _rows_by_bits(table: Array, tokens: Array) -> Array:
    """As integers: for a CPU XLA makes float32 of a whole bfloat16 table before it looks up a row, 9.4 GB of E2B's."""
    bits = jax.lax.bitcast_convert_type(table, jnp.uint16)
    return jax.lax.bitcast_convert_type(bits.at[tokens].get(mode="promise_in_bounds"), table.dtype)


_rows_by_bits.defvjp(
    lambda table, tokens: (_rows_by_bits(table, tokens), (table, tokens)),
    lambda kept, cotangent: (jnp.zeros_like(kept[0]).at[kept[1]].add(cotangent), None),
)


def _names(part: Any) -> tuple[str, ...]:
    """Of an axis of an array, the mesh axes that cut it."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)
