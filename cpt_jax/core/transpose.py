"""A matrix transposed in memory, by blocks and threads: NumPy's own copy of a transposed view reads a column at a time
(`python -m benchmarks.loading --transpose` has both speeds)."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# Rows whose pieces of a cache line are written while the line is there.
_BLOCK = 16
_PARTS = 4 * (os.cpu_count() or 1)
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def transposed(matrix: np.ndarray) -> np.ndarray:
    """`matrix.T` in C order, whatever the order of `matrix`."""
    if matrix.ndim != 2 or matrix.T.flags.c_contiguous:
        return np.ascontiguousarray(matrix.T)
    # NumPy copies numbers of types it was taught (bfloat16) one by one.
    bits = matrix.view(_UNSIGNED[matrix.dtype.itemsize])
    rows, columns = matrix.shape
    out = np.empty((columns, rows), bits.dtype)

    def copy(first: int) -> None:
        for start in range(first, min(first + size, rows), _BLOCK):
            out[:, start : start + _BLOCK] = bits[start : start + _BLOCK].T

    # Threads write to different cache lines: their parts are multiples of many blocks.
    size = max(256, -(-rows // _PARTS // 256) * 256)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(copy, range(0, rows, size)))
    return out.view(matrix.dtype)
