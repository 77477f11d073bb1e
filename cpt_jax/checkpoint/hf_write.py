"""Hugging Face model directories, written whole or not at all."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cpt_jax.checkpoint.hf import CHUNK_VALUES, names_in, tensor_shapes, tensors_of
from cpt_jax.checkpoint.packed import TensorFile
from cpt_jax.checkpoint.safetensors_write import Tensor, write_weights
from cpt_jax.core.storage import atomic_directory, write_bytes_atomic
from cpt_jax.core.transpose import transposed
from cpt_jax.core.tree import Tree, flatten
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.families import family_for
from cpt_jax.models.families.composite import Composite, with_text_fields
from cpt_jax.models.families.schema import Place
from cpt_jax.models.linear import CORRECTION_BIAS
from cpt_jax.models.vocab_table import TABLES

# Files of a model directory that are not weights and go along unchanged: the tokenizer's, and others.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
OTHER_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
SHARD_BYTES = 5 << 30


def hf_tensor(places: tuple[Place, ...], flat: dict[str, Any], config: DecoderConfig, dtype: np.dtype) -> np.ndarray:
    """A tensor of a HF directory, or a member of a stack, made of our leaves."""

    def matrix(place: Place) -> np.ndarray:
        if place.path in TABLES:
            return np.concatenate(list(_rows(place, flat, config, dtype)))
        array = np.asarray(flat[place.path][place.index or ...]).astype(dtype, copy=False)
        return transposed(array) if place.transposed else array

    matrices = [matrix(place) for place in places]
    columns = places[0].columns is not None
    parts = [place.columns if columns else place.rows for place in places]
    if parts[0] is None:
        return matrices[0]
    # Block by block, the rows (or columns) of one part behind those of the other.
    shape, sizes = matrices[0].shape, [part.last - part.first for part in parts if part is not None]
    before, after = (shape[:-1], ()) if columns else ((), shape[1:])
    blocks = [each.reshape(*before, -1, size, *after) for each, size in zip(matrices, sizes, strict=True)]
    return np.concatenate(blocks, axis=len(before) + 1).reshape(*before, -1, *after)


def _rows(place: Place, flat: dict[str, Any], config: DecoderConfig, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tokens' rows of both parts of a table, some at a time."""
    for part, count in config.table_rows.items():
        leaf = flat[f"{place.path}/{part}"]
        step = max(1, CHUNK_VALUES // leaf.shape[1])
        for first in range(0, count, step):
            yield np.asarray(leaf[first : min(first + step, count)]).astype(dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class _Written:
    """A tensor of a HF directory, made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    places: tuple[Place, ...]
    flat: dict[str, Any]
    config: DecoderConfig

    def pieces(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        if self.places[0].path in TABLES:
            yield from _rows(self.places[0], self.flat, self.config, dtype)
            return
        for _, places in itertools.groupby(self.places, key=lambda place: place.member):
            yield hf_tensor(tuple(places), self.flat, self.config, dtype)


@dataclasses.dataclass(frozen=True)
class _Copied:
    """A tensor that is none of the text model's, as another directory has it."""

    name: str
    file: TensorFile

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.tensors[self.name].shape

    def pieces(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        del dtype  # its own
        yield self.file.read(self.name)


def save(
    directory: Path,
    config: DecoderConfig,
    weights: Tree,
    hf_config: dict,
    tokenizer_directory: Path,
    *,
    origin: Path | None = None,
    dtype: Any = np.float32,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a Hugging Face model directory: base and new rows become one table, tied heads stay tied.

    One tensor is in memory at a time, of a vocabulary's table a part of it.

    Args:
      tokenizer_directory: whose tokenizer files go along.
      origin: the model that this was made of. Its generation_config.json goes along (default: the tokenizer
        directory's), and of a model that also sees, what prepares images; and all tensors that are not the text model's,
        bit for bit. Experts are stacked as there (default: one by one).

    Raises:
      UserError: the disk is full (nothing is left behind then).
    """
    dtype, flat = np.dtype(dtype), flatten(weights)
    family = family_for(hf_config)
    assert origin is not None or not isinstance(family, Composite), "what is not the text model's comes from there"
    held = tensors_of(origin) if origin is not None else {}
    names, beside = names_in(family, held, config)
    shapes = tensor_shapes(config, names)
    # A correction bias of 16 bits would choose other experts; transformers keeps it in float32 too.
    exact = {name for name, places in names.items() if places[0].path.endswith(CORRECTION_BIAS)}
    tensors: list[tuple[Tensor, np.dtype]] = [
        (_Written(name, shapes[name], places, flat, config), np.dtype(np.float32) if name in exact else dtype)
        for name, places in names.items()
    ]
    tensors += [(_Copied(name, held[name]), held[name].tensors[name].dtype) for name in beside]
    with atomic_directory(Path(directory)) as out:
        write_weights(out, tensors, shard_bytes)
        rows = {"vocab_size": config.total_rows}
        if config.layer_input_size is not None:
            rows["vocab_size_per_layer_input"] = config.total_rows
        saved_config = with_text_fields(hf_config, rows) | {"dtype": dtype.name}
        saved_config.pop("torch_dtype", None)
        # What was read from few bits is written in `dtype`.
        saved_config.pop("quantization_config", None)
        write_config(out, saved_config)
        places = [Path(tokenizer_directory) / name for name in TOKENIZER_FILES]
        places += [Path(origin or tokenizer_directory) / name for name in OTHER_FILES]
        for source in places:
            if source.exists():
                shutil.copyfile(source, out / source.name)


def write_config(directory: Path, hf_config: dict) -> None:
    """Writes config.json. Infinities (limits of Mamba's steps) stay as the base's makers wrote them, though JSON has no
    word for them."""
    write_bytes_atomic(directory / "config.json", (json.dumps(hf_config, ensure_ascii=False, indent=2) + "\n").encode())
