"""Arrays that are read when they are needed, and only the part that is needed."""

from collections.abc import Callable
from typing import Any

import numpy as np

Slices = tuple[slice, ...]


class LazyArray:
    """An array [*shape] whose parts are made on demand; `leaf[...]` and `np.asarray(leaf)` make NumPy arrays, and
    nothing is kept.

    Args:
      read: makes a part of a wanted type, from one slice of step 1 for each axis, with its bounds.
      row_axis: the axis along which parts lie together in the file, if there is one: reading a part of it reads
        nothing else.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        read: Callable[[Slices, np.dtype], np.ndarray],
        row_axis: int | None = None,
    ) -> None:
        self.shape, self.dtype, self.row_axis, self._read = tuple(shape), np.dtype(dtype), row_axis, read

    def part(self, slices: Slices, dtype: Any) -> np.ndarray:
        """The part within `slices` (one for each axis, of step 1, with bounds), as `dtype`."""
        return self._read(slices, np.dtype(dtype))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, list | np.ndarray) and np.issubdtype(np.asarray(index).dtype, np.integer):
            return self._chosen(np.asarray(index))
        given: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(part, slice | int | np.integer) for part in given):
            return np.asarray(self)[index]
        slices: list[slice] = []
        for position, size in enumerate(self.shape):
            part = given[position] if position < len(given) else slice(None)
            if isinstance(part, slice):
                start, stop, step = part.indices(size)
                if step != 1:
                    return np.asarray(self)[index]
                slices.append(slice(start, max(start, stop)))
            else:
                if not -size <= part < size:
                    raise IndexError(f"index {part} is out of bounds for an axis of {size}")
                slices.append(slice(int(part) % size, int(part) % size + 1))
        array = self.part(tuple(slices), self.dtype)
        return array[tuple(0 if not isinstance(part, slice) else slice(None) for part in given)]

    def _chosen(self, numbers: np.ndarray) -> np.ndarray:
        """The parts with these numbers along the first axis, each read once."""
        different, places = np.unique(numbers, return_inverse=True)
        parts = [self[int(number)] for number in different]
        return np.stack(parts)[places.reshape(numbers.shape)] if parts else np.empty((0, *self.shape[1:]), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.part(tuple(slice(0, size) for size in self.shape), self.dtype if dtype is None else dtype)


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that begins at a multiple of 64 bytes, as XLA wants it to take it over on a CPU without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + size].view(dtype).reshape(shape)


def rows_of(leaf: Any, first: int, last: int, filled: int) -> LazyArray:
    """Rows `first` to `last` of an array, lazy or not, and zeros behind them up to `filled` rows."""
    count = last - first

    def read(slices: Slices, dtype: np.dtype) -> np.ndarray:
        rows, rest = slices[0], slices[1:]
        held = slice(first + min(rows.start, count), first + min(rows.stop, count))
        part = leaf.part((held, *rest), dtype) if isinstance(leaf, LazyArray) else leaf[(held, *rest)]
        missing = (rows.stop - rows.start) - (held.stop - held.start)
        part = np.asarray(part).astype(dtype, copy=False)
        return part if not missing else np.pad(part, ((0, missing),) + ((0, 0),) * len(rest))

    return LazyArray((filled, *leaf.shape[1:]), leaf.dtype, read, row_axis=0)


def stacked(
    slices: Slices, depth: int, dtype: np.dtype, part: Callable[[tuple[int, ...], Slices], np.ndarray]
) -> np.ndarray:
    """What `slices` ask for of an array whose first `depth` axes stack parts, each made by `part(index, inner slices)`
    and held one at a time."""
    outer, inner = slices[:depth], slices[depth:]
    counts = tuple(each.stop - each.start for each in outer)
    out = empty(counts + tuple(each.stop - each.start for each in inner), dtype)
    for index in np.ndindex(counts):
        out[index] = part(tuple(each.start + i for each, i in zip(outer, index, strict=True)), inner)
    return out
