"""Hugging Face model directories, read by the part that is needed."""

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cpt_jax.checkpoint.mxfp4 import Mxfp4
from cpt_jax.checkpoint.packed import TensorFile, with_unpacked
from cpt_jax.checkpoint.safetensors_file import SafetensorsFile
from cpt_jax.checkpoint.safetensors_write import INDEX, SINGLE
from cpt_jax.core.errors import UserError
from cpt_jax.core.lazy import LazyArray, Slices, stacked
from cpt_jax.core.transpose import transposed
from cpt_jax.core.tree import Tree, flatten, unflatten
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.models.families import family_for
from cpt_jax.models.families.composite import Composite, beginnings_beside, text_fields
from cpt_jax.models.families.schema import Names, Place
from cpt_jax.models.families.stacked_experts import with_stacks
from cpt_jax.models.vocab_table import TABLES

# transformers may save buffers that follow from the config, and a tied head besides the embedding.
DERIVED = ("rotary_emb.inv_freq", ".attention.bias", ".masked_bias")
HEADS = ("lm_head.weight", "language_model.lm_head.weight", "embed_out.weight")
# Values of a table that are compared at a time: 64 MiB in float32.
CHUNK_VALUES = 1 << 24


def read_config(directory: Path) -> dict:
    """config.json of a model directory."""
    path = directory / "config.json"
    if not path.exists():
        raise UserError(f"{directory} has no config.json: give a Hugging Face model directory")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: fetch the model again") from error


def named_ids(directory: Path) -> Iterator[tuple[Path, str, list[int]]]:
    """(file, name, ids) of the tokens that config.json and generation_config.json give a meaning: the beginning, the
    end (which may be several), padding, places of images, what is never generated."""
    for path in (directory / "config.json", directory / "generation_config.json"):
        written = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        text = text_fields(written)
        for fields in (written,) if text is written else (written, text):
            for name, given in fields.items():
                if name.endswith(("_token_id", "_token_index", "suppress_tokens")):
                    yield path, name, given if isinstance(given, list) else [] if given is None else [given]


def weight_files(directory: Path) -> list[str]:
    """The safetensors files of a directory: one, or those of its index, which may name files in an object store. As in
    transformers, the one goes first: an index beside it was left by an earlier save."""
    if (directory / SINGLE).exists():
        return [str(directory / SINGLE)]
    if (directory / INDEX).exists():
        try:
            files = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{directory / INDEX} is no index of weights: fetch the model again") from error
        if missing := [name for name in files if "://" not in name and not (directory / name).exists()]:
            raise UserError(f"{directory} lacks {missing[0]}, which {INDEX} names: fetch the model again")
        return [name if "://" in name else str(directory / name) for name in files]
    if pickles := sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern)):
        raise UserError(
            f"{directory} has its weights as pickle only ({pickles[0]}), which can run code: convert them to safetensors"
        )
    raise UserError(f"{directory} has no weights (no {SINGLE}): give a whole model directory")


def tensors_of(directory: Path) -> dict[str, TensorFile]:
    """The file of each tensor of a model directory; what is packed is one tensor."""
    files = [SafetensorsFile(path) for path in weight_files(directory)]
    return with_unpacked({name: file for file in files for name in file.tensors})


def names_in(family: Any, tensors: Collection[str], config: DecoderConfig) -> tuple[Names, Collection[str]]:
    """Where tensors belong, by their names in the directory that holds these; and those that are none of the text
    model's, which go along as they are."""
    text = family.text if isinstance(family, Composite) else family
    always = getattr(text, "STACKED", False)
    if isinstance(family, Composite):
        return with_stacks(family.names_in(tensors, config), tensors, config, always), family.beside(tensors, config)
    beside = [name for name in tensors if name.startswith(beginnings_beside(family, config))]
    return with_stacks(family.weight_names(config), tensors, config, always), beside


def load(directory: Path) -> tuple[DecoderConfig, Tree, dict]:
    """A model directory as (our configuration, weights in the files' dtype, its config.json).

    The weights are LazyArrays: headers are read and checked now, numbers when they are asked for.

    Raises:
      UserError: no weights, pickles only, truncated files, tensors missing or too many, other shapes, a head that
      is to be tied and is not the embedding, unsupported architecture.
    """
    directory = Path(directory)
    hf_config = read_config(directory)
    family = family_for(hf_config)
    config = family.config_from_hf(hf_config)
    held = tensors_of(directory)
    names, beside = names_in(family, held, config)
    names = {name: _as_held(places, held.get(name)) for name, places in names.items()}
    files: dict[str, TensorFile] = {}
    heads: dict[str, TensorFile] = {}
    for name, file in held.items():
        if name in names:
            files[name] = file
        elif config.tie_word_embeddings and name in HEADS:
            heads[name] = file
        elif name not in beside and not name.endswith(DERIVED):
            raise UserError(
                f"{directory} holds a tensor {name!r} that this architecture does not have: wrong config.json?"
            )
    if missing := [name for name in names if name not in files]:
        raise UserError(f"{directory} lacks {len(missing)} tensors, {missing[0]!r} first: the download is incomplete")
    shapes = flatten(abstract_decoder(config).shapes)
    expected = tensor_shapes(config, names)
    sources: dict[str, dict[tuple[int, ...], _Source]] = {}
    for name, places in names.items():
        if (given := files[name].tensors[name].shape) != expected[name]:
            rows = places[0].path in TABLES
            hint = "run `cpt model extend`" if rows else "config.json and weights do not belong together"
            raise UserError(
                f"{directory}: {name} has shape {list(given)}, config.json asks for {list(expected[name])}: {hint}"
            )
        for place in places:
            path = f"{place.path}/base" if place.path in TABLES else place.path
            sources.setdefault(path, {})[place.index] = _Source(files[name], name, place)
    _check_tied(directory, sources["embed/base"][()], heads)
    return config, unflatten({path: _leaf(shapes[path].shape, sources[path]) for path in shapes}), hf_config


def _as_held(places: tuple[Place, ...], file: TensorFile | None) -> tuple[Place, ...]:
    """Where a tensor belongs: in MXFP4 it is [outputs, inputs], and not as the model has it in memory."""
    if not isinstance(file, Mxfp4):
        return places
    return tuple(dataclasses.replace(place, transposed=True, rows=place.columns, columns=None) for place in places)


def tensor_shapes(config: DecoderConfig, names: Names) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a HF directory, tables whole and without padding."""
    whole = dataclasses.replace(config, vocab_size=config.total_rows, new_rows=0, row_multiple=1)
    shapes = flatten(abstract_decoder(whole).shapes)

    def shape(place: Place) -> tuple[int, ...]:
        leaf = shapes[f"{place.path}/base" if place.path in TABLES else place.path]
        inner = leaf.shape[len(place.index) :]
        return inner[::-1] if place.transposed else inner

    def whole_shape(places: tuple[Place, ...]) -> tuple[int, ...]:
        if not shape(places[0]):
            return ()
        members = len({place.member for place in places})
        rows = sum(shape(place)[0] for place in places) // members
        stack = () if places[0].member is None else (members,)
        if places[0].columns is not None:
            first, columns = shape(places[0])
            return (*stack, first, columns * len(places) // members)
        return (*stack, rows, *shape(places[0])[1:])

    return {name: whole_shape(places) for name, places in names.items()}


def widest(types: Iterable[np.dtype]) -> np.dtype:
    """The type that holds the values of all these types of weights: float32 where they are of several kinds."""
    found = set(types)
    return found.pop() if len(found) == 1 else np.result_type(np.float32, *(t for t in found if t.itemsize > 4))


class _Source:
    """One matrix (or vector) of ours in a file."""

    def __init__(self, file: TensorFile, name: str, place: Place) -> None:
        self.file, self.name, self.place = file, name, place

    @property
    def dtype(self) -> np.dtype:
        return self.file.tensors[self.name].dtype

    def read(self, slices: Slices) -> np.ndarray:
        """These slices of it; of the file, only the rows they lie in are read."""
        if not slices:
            return self.file.read(self.name)
        wanted = slices[::-1] if self.place.transposed else slices
        rows, rest, part = wanted[0], wanted[1:], self.place.rows
        if (of := self.place.columns) is not None:
            array = self.file.read(self.name, rows, self.place.member)
            array = array.reshape(len(array), -1, of.block)[..., of.first : of.last].reshape(len(array), -1)
        elif part is None:
            array = self.file.read(self.name, rows, self.place.member)
        else:
            size = part.last - part.first
            blocks = slice(rows.start // size, -(-rows.stop // size))
            wanted_rows = slice(blocks.start * part.block, blocks.stop * part.block)

            def picked(array: np.ndarray) -> np.ndarray:
                array = array.reshape(-1, part.block, *array.shape[1:])[:, part.first : part.last]
                return array.reshape(-1, *array.shape[2:])

            if isinstance(self.file, Mxfp4):
                array = self.file.read(self.name, wanted_rows, self.place.member, picked)
            else:
                array = picked(self.file.read(self.name, wanted_rows, self.place.member))
            array = array[rows.start - blocks.start * size : rows.stop - blocks.start * size]
        array = array[(slice(None), *rest)]
        return transposed(array) if self.place.transposed else array


def _check_tied(directory: Path, embedding: _Source, heads: Mapping[str, TensorFile]) -> None:
    """Raises a UserError where a head that is to be tied is stored, and is not the embedding (transformers 5 keeps both
    then, and 4 the embedding alone)."""
    shape = embedding.file.tensors[embedding.name].shape
    step = max(1, CHUNK_VALUES // shape[1])
    for name, file in heads.items():
        pieces = [slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]
        if file.tensors[name].shape != shape or not all(
            np.array_equal(embedding.file.read(embedding.name, rows), file.read(name, rows)) for rows in pieces
        ):
            raise UserError(
                f"{directory} holds {name}, which is not {embedding.name}, while config.json has tie_word_embeddings=true: set it to false to keep both, or take the tensor out"
            )


def _leaf(shape: tuple[int, ...], sources: dict[tuple[int, ...], _Source]) -> LazyArray:
    """A leaf from its matrices, by their index along its stacked axes."""
    first, kept = next(iter(sources.values())), widest(source.dtype for source in sources.values())
    depth = len(first.place.index)
    rows = len(shape) - 1 if first.place.transposed else depth

    def read(slices: Slices, dtype: np.dtype) -> np.ndarray:
        if not depth:
            return first.read(slices).astype(dtype, copy=False)
        return stacked(slices, depth, dtype, lambda index, inner: sources[index].read(inner))

    return LazyArray(shape, kept, read, rows if rows < len(shape) else None)
