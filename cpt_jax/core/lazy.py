"""Arrays that are read when they are needed, and only the part that is needed."""

from collections.abc import Callable
from typing import Any

import numpy as np

Slices = tuple[slice, ...]


class LazyArray:
    """An array [*shape] whose parts are made on demand: `read` gets one slice of step 1 for each axis, with its bounds.

    `leaf[...]` and `np.asarray(leaf)` make NumPy arrays; nothing is kept.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[Slices], np.ndarray]) -> None:
        self.shape, self.dtype, self._read = tuple(shape), np.dtype(dtype), read

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
        given = index if isinstance(index, tuple) else (index,)
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
        array = self._read(tuple(slices))
        return array[tuple(0 if not isinstance(part, slice) else slice(None) for part in given)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self._read(tuple(slice(0, size) for size in self.shape))
        return array if dtype is None else array.astype(dtype, copy=False)


def stacked(
    slices: Slices, depth: int, dtype: Any, part: Callable[[tuple[int, ...], Slices], np.ndarray]
) -> np.ndarray:
    """What `slices` ask for of an array whose first `depth` axes stack parts, each made by `part(index, inner slices)`."""
    outer, inner = slices[:depth], slices[depth:]
    counts = tuple(each.stop - each.start for each in outer)
    out = np.empty(counts + tuple(each.stop - each.start for each in inner), dtype)
    for index in np.ndindex(counts):
        out[index] = part(tuple(each.start + i for each, i in zip(outer, index, strict=True)), inner)
    return out
