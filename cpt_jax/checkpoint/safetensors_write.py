"""Safetensors files written piece by piece: the library's own function wants all tensors of a file in memory.

The format is 8 bytes of length, a JSON header with type, shape and place of each tensor, and their values
(huggingface/safetensors, README).
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from cpt_jax.checkpoint.safetensors_file import DTYPES
from cpt_jax.core.storage import write_json_atomic

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Tensor(Protocol):
    """A tensor to be written: `pieces` gives its rows, some at a time, in the type that it is to have."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def pieces(self, dtype: np.dtype) -> Iterable[np.ndarray]: ...


# With the type that it is to have.
Typed = tuple[Tensor, np.dtype]


def _nbytes(tensor: Tensor, dtype: np.dtype) -> int:
    return math.prod(tensor.shape) * dtype.itemsize


def write_weights(directory: Path, tensors: Sequence[Typed], shard_bytes: int) -> None:
    """One file, or several of at most `shard_bytes` and their index; a tensor larger than that has a file of its own."""
    shards: list[list[Typed]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _nbytes(*tensor)
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    if len(shards) == 1:
        _write_file(directory / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file, shard)
        weight_map |= {tensor.name: file for tensor, _ in shard}
    total = sum(_nbytes(*tensor) for tensor in tensors)
    write_json_atomic(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_file(path: Path, tensors: Sequence[Typed]) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, dtype in tensors:
        start, end = end, end + _nbytes(tensor, dtype)
        header[tensor.name] = {
            "dtype": _NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, dtype in tensors:
            for piece in tensor.pieces(dtype):
                # The bytes as they lie in C order: an array in another order is put into it first.
                file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
