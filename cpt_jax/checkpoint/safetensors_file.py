"""Safetensors files read by row ranges, from a local disk or an object store (gs://, s3://, ...).

The format: 8 bytes of header length (little endian), a JSON header with each tensor's type, shape and place, then the
tensors' bytes, row-major (huggingface/safetensors, README). The library's own reader needs a local file.
"""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cpt_jax.core.errors import UserError
from cpt_jax.core.lazy import empty

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# The format's own limit.
_LARGEST_HEADER = 100_000_000


class Described(NamedTuple):
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    dtype: np.dtype


class SafetensorsFile:
    """One file's tensors. Opened for each read, so that nothing stays mapped or open.

    Raises:
      UserError: the file is missing, truncated or corrupt, or has tensors of an unsupported type.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        with self._open() as (file, size):
            self._read_header(file, size)

    @contextlib.contextmanager
    def _open(self):
        try:
            if "://" in self.path:
                import fsspec

                system, path = fsspec.url_to_fs(self.path)
                with system.open(path, "rb") as file:
                    yield file, system.size(path)
            else:
                with open(self.path, "rb", buffering=0) as file:
                    yield file, os.fstat(file.fileno()).st_size
        except (OSError, ImportError) as error:
            raise UserError(f"{self.path} cannot be read ({type(error).__name__}: {error})") from error

    def _read_header(self, file: Any, size: int) -> None:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise self._corrupt(f"its header would be {length:,} bytes long in a file of {size:,}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            if unknown := [name for name, entry in header.items() if entry["dtype"] not in DTYPES]:
                raise UserError(
                    f"{self.path} holds {unknown[0]} as {header[unknown[0]]['dtype']}, which is not supported: give the model in float32, bfloat16 or float16"
                )
            self.tensors = {name: _Tensor(entry, 8 + length) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._corrupt(f"its header cannot be read: {error}") from error
        for name, tensor in self.tensors.items():
            if tensor.stop - tensor.start != math.prod(tensor.shape) * tensor.dtype.itemsize:
                raise self._corrupt(f"the shape of {name} does not fit its bytes")
        if (end := max((tensor.stop for tensor in self.tensors.values()), default=8 + length)) != size:
            raise self._corrupt(f"it has {size:,} bytes, its header speaks of {end:,}")

    def _corrupt(self, why: str) -> UserError:
        return UserError(f"{self.path} is truncated or corrupt ({why}): fetch it again")

    def read(self, name: str, rows: slice | None = None, member: int | None = None) -> np.ndarray:
        """A tensor, or the rows of its first axis from `rows.start` to `rows.stop`, or of a `member` of a stack of
        tensors those: only their bytes are read."""
        tensor = self.tensors[name]
        shape, start, size = tensor.shape, tensor.start, tensor.stop - tensor.start
        if member is not None:
            size //= shape[0]
            shape, start = shape[1:], start + member * size
        if rows is not None and shape:
            of_row = size // max(1, shape[0])
            shape, start = (rows.stop - rows.start, *shape[1:]), start + rows.start * of_row
        buffer = empty((math.prod(shape) * tensor.dtype.itemsize,), np.uint8)
        view, done = buffer.data, 0
        with self._open() as (file, _):
            file.seek(start)
            while done < len(buffer):
                if not (count := file.readinto(view[done:])):
                    raise self._corrupt(f"{name} ends early")
                done += count
        return buffer.view(tensor.dtype).reshape(shape)


class _Tensor:
    """Type, shape and place (in bytes, from the file's beginning) of a tensor."""

    def __init__(self, entry: dict, offset: int) -> None:
        self.dtype, self.shape = DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"])
        self.start, self.stop = (offset + int(place) for place in entry["data_offsets"])
