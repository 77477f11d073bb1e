"""Hugging Face model directories: read tensor by tensor, written whole or not at all."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy learns bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import atomic_directory, write_json_atomic
from cpt_jax.core.tree import Tree, flatten, unflatten
from cpt_jax.models.decoder import DecoderConfig, abstract_decoder
from cpt_jax.models.families import family_for

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Files of a model directory that are not weights and go along unchanged.
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
# transformers may save buffers that follow from the config, and a tied head besides the embedding.
DERIVED = ("rotary_emb.inv_freq", ".attention.bias", ".masked_bias")
SHARD_BYTES = 5 << 30


def resolve_base(base: str, cache: Path) -> Path:
    """A model directory: `base` itself, a .gguf file converted into `cache`, or a hub id fetched to the hub's own
    cache.

    Raises:
      UserError: there is no such file or directory, or the hub cannot give it.
    """
    path = Path(base).expanduser()
    if path.is_dir():
        return path
    if base.endswith(".gguf"):
        if not path.exists():
            raise UserError(f"base {base} does not exist")
        from cpt_jax.checkpoint.gguf import import_gguf

        origin = {"file": str(path.resolve()), "bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns}
        mark = cache / "gguf.json"
        if not mark.exists() or json.loads(mark.read_text()) != origin:
            import_gguf(path, cache)
            write_json_atomic(mark, origin)
        return cache
    if path.exists() or base.count("/") != 1 or base.startswith((".", "/", "~")):
        raise UserError(
            f"base {base!r} is neither a model directory, nor a .gguf file, nor a hub id like HuggingFaceTB/SmolLM2-135M"
        )
    import huggingface_hub

    try:
        # Weights as safetensors only: pickles can run code when they are opened.
        return Path(
            huggingface_hub.snapshot_download(
                base, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
            )
        )
    except Exception as error:
        raise UserError(
            f"hub id {base!r} could not be fetched ({type(error).__name__}): check the name, the network and your token, or give a directory"
        ) from error


def read_config(directory: Path) -> dict:
    """config.json of a model directory."""
    path = directory / "config.json"
    if not path.exists():
        raise UserError(f"{directory} has no config.json: give a Hugging Face model directory")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: fetch the model again") from error


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, by its index if it has one."""
    if (directory / INDEX).exists():
        files = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
        if missing := [name for name in files if not (directory / name).exists()]:
            raise UserError(f"{directory} lacks {missing[0]}, which {INDEX} names: fetch the model again")
        return [directory / name for name in files]
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    if pickles := sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern)):
        raise UserError(
            f"{directory} has its weights as pickle only ({pickles[0]}), which can run code: convert them to safetensors"
        )
    raise UserError(f"{directory} has no weights (no {SINGLE}): give a whole model directory")


def tensors(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) one after the other; no more than one tensor is in memory at a time.

    Raises:
      UserError: a file is truncated or corrupt.
    """
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is truncated or corrupt ({error}): fetch it again") from error


def load(directory: Path) -> tuple[DecoderConfig, Tree, dict]:
    """A model directory as (our configuration, weights on the host in the files' dtype, its config.json).

    Raises:
      UserError: no weights, pickles only, truncated files, tensors missing or too many, other shapes, unsupported
      architecture.
    """
    directory = Path(directory)
    hf_config = read_config(directory)
    family = family_for(hf_config)
    config = family.config_from_hf(hf_config)
    names = family.weight_names(config)
    shapes = flatten(abstract_decoder(config).shapes)
    flat: dict[str, np.ndarray] = {}
    seen = set()
    for name, array in tensors(directory):
        if name not in names:
            if name.endswith(DERIVED) or (name == "lm_head.weight" and config.tie_word_embeddings):
                continue
            raise UserError(
                f"{directory} holds a tensor {name!r} that this architecture does not have: wrong config.json?"
            )
        place = names[name]
        path = place.path if place.path in shapes else f"{place.path}/base"
        expected = shapes[path].shape if place.layer is None else shapes[path].shape[1:]
        given = array.T if place.transposed else array
        if given.shape != expected:
            hint = (
                ": run `cpt model extend`"
                if path.endswith("/base")
                else ": config.json and weights do not belong together"
            )
            raise UserError(
                f"{directory}: {name} has shape {list(array.shape)}, config.json asks for {list(expected)}{hint}"
            )
        if place.layer is None:
            flat[path] = np.array(given)
        else:
            if path not in flat:
                flat[path] = np.empty(shapes[path].shape, array.dtype)
            flat[path][place.layer] = given
        seen.add(name)
    if missing := [name for name in names if name not in seen]:
        raise UserError(f"{directory} lacks {len(missing)} tensors, {missing[0]!r} first: the download is incomplete")
    return config, unflatten(flat), hf_config


def _hf_tensors(config: DecoderConfig, weights: Tree, hf_config: dict, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    flat = flatten(weights)
    for name, place in family_for(hf_config).weight_names(config).items():
        if place.path in ("embed", "head"):
            rows = config.table_rows
            parts = [np.asarray(flat[f"{place.path}/{part}"][:count]) for part, count in rows.items()]
            array = np.concatenate([part.astype(dtype) for part in parts])
        else:
            array = np.asarray(flat[place.path] if place.layer is None else flat[place.path][place.layer]).astype(dtype)
        yield name, np.ascontiguousarray(array.T if place.transposed else array)


def save(
    directory: Path,
    config: DecoderConfig,
    weights: Tree,
    hf_config: dict,
    tokenizer_directory: Path,
    dtype: Any = np.float32,
) -> None:
    """Writes a Hugging Face model directory: base and new rows become one table, tied heads stay tied.

    Raises:
      UserError: the disk is full (nothing is left behind then).
    """
    from safetensors.numpy import save_file

    dtype = np.dtype(dtype)
    with atomic_directory(Path(directory)) as out:
        shards: list[dict[str, np.ndarray]] = [{}]
        size, total, names = 0, 0, {}
        for name, array in _hf_tensors(config, weights, hf_config, dtype):
            if size and size + array.nbytes > SHARD_BYTES:
                save_file(shards[-1], out / f"model-{len(shards):05d}.safetensors", metadata={"format": "pt"})
                shards[-1] = {}
                shards.append({})
                size = 0
            shards[-1][name] = array
            names[name] = len(shards)
            size, total = size + array.nbytes, total + array.nbytes
        if len(shards) == 1:
            save_file(shards[0], out / SINGLE, metadata={"format": "pt"})
        else:
            save_file(shards[-1], out / f"model-{len(shards):05d}.safetensors", metadata={"format": "pt"})
            weight_map = {name: f"model-{shard:05d}.safetensors" for name, shard in names.items()}
            write_json_atomic(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        saved_config = family_for(hf_config).config_to_hf(config, hf_config) | {"dtype": dtype.name}
        saved_config.pop("torch_dtype", None)
        write_json_atomic(out / "config.json", saved_config)
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            if (source := Path(tokenizer_directory) / name).exists():
                shutil.copyfile(source, out / name)
