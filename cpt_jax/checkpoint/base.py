"""Where a base model is found: a directory, a GGUF file, a hub id, or an object store."""

import json
from collections.abc import Callable
from pathlib import Path

from cpt_jax.checkpoint.hf import INDEX, SINGLE, load
from cpt_jax.checkpoint.hf_write import OTHER_FILES, TOKENIZER_FILES, save
from cpt_jax.checkpoint.hub import hub_parts, is_hub_id
from cpt_jax.checkpoint.peft import load_adapter
from cpt_jax.checkpoint.peft.config import FILE as ADAPTER
from cpt_jax.checkpoint.peft.config import read_peft_config
from cpt_jax.checkpoint.safetensors_file import SafetensorsFile
from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import atomic_directory, write_json_atomic
from cpt_jax.core.stores import Location, fetched, is_address, state_of
from cpt_jax.models.linear import merge_lora

# Of a directory that was made of files: which, and as they were.
MADE_OF = "made_of.json"
_SMALL_FILES = {*TOKENIZER_FILES, *OTHER_FILES, INDEX, "config.json"}


def resolve_base(base: str, cache: Path, *, weights: bool = True) -> Path:
    """A model directory: `base` itself, or in `cache` a .gguf file converted, a PEFT adapter merged into its base, or a
    view of a directory in an object store (gs://, s3://), whose weights stay there; a hub id, ORG/NAME or
    ORG/NAME@REVISION, is fetched to the hub's own cache. Without `weights`, that directory may be a tokenizer's alone (of
    a .gguf file, one beside `cache`).

    Raises:
      UserError: there is no such file or directory, or the hub cannot give it.
    """
    path = Path(base).expanduser()
    if (path / ADAPTER).exists() and not (path / "config.json").exists():
        return _made(_states([*_files(path), *_files_of_base(path)]), cache, lambda: _merge_adapter(path, cache))
    if path.is_dir():
        return path
    if base.endswith(".gguf"):
        if not is_address(base) and not path.exists():
            raise UserError(f"base {base} does not exist")
        states = [state_of(base)] if is_address(base) else _states([path])
        if not weights and not _is_made(states, cache):
            # Dequantised, weights are several times as large as the file.
            cache = cache.with_name(cache.name + ".tokenizer")
        return _made(states, cache, lambda: _import_gguf(base if is_address(base) else path, cache, weights))
    if is_address(base):
        return _view(base.rstrip("/"), cache, weights)
    if not is_hub_id(base):
        raise UserError(
            f"base {base!r} is neither a model directory, nor a .gguf file, nor a hub id like HuggingFaceTB/SmolLM2-135M, nor a URL like gs://bucket/model"
        )
    directory = _snapshot(base, weights)
    if not weights and (_has_tokenizer(directory) or not (directory / ADAPTER).exists()):
        return directory
    return resolve_base(str(directory if weights else _snapshot(base, weights=True)), cache)


def _snapshot(base: str, weights: bool) -> Path:
    """What is fetched of a hub id. Weights as safetensors only: pickles can run code when they are opened."""
    import huggingface_hub

    hub_id, revision = hub_parts(base)
    wanted = ["*.json", "*.jinja", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
    try:
        # The same weights a second time, as their makers' own code reads them, are as large as the first.
        found = huggingface_hub.snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=["*/*", "consolidated*.safetensors"],
        )
    except Exception as error:
        raise UserError(
            f"hub id {base!r} could not be fetched ({type(error).__name__}): check the name, the network and your token, or give a directory"
        ) from error
    return Path(found)


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).exists() for name in TOKENIZER_FILES[:2])


def _files(directory: Path) -> list[Path]:
    return sorted(file for file in directory.iterdir() if file.is_file())


def _files_of_base(adapter: Path) -> list[Path]:
    """What an adapter's merged weights depend on besides itself; of a hub id or an address nothing is asked."""
    base = Path(read_peft_config(adapter).base or "").expanduser()
    return _files(base) if base.is_dir() and base != Path() else [base] if base.is_file() else []


def _states(files: list[Path]) -> list:
    """What tells whether files are as they were."""
    found = [(file.resolve(), file.stat()) for file in files]
    return [{"file": str(file), "bytes": s.st_size, "modified": s.st_mtime_ns} for file, s in found]


def _import_gguf(file: Location, cache: Path, weights: bool) -> None:
    from cpt_jax.checkpoint.gguf import import_gguf

    with fetched(file) as path:
        import_gguf(path, cache, weights=weights)


def _made(origin: list, cache: Path, make: Callable[[], None]) -> Path:
    """`cache`, made of files that are as `origin` says, unless it was made of these."""
    if not _is_made(origin, cache):
        make()
        write_json_atomic(cache / MADE_OF, origin)
    return cache


def _is_made(origin: list, cache: Path) -> bool:
    mark = cache / MADE_OF
    return mark.exists() and json.loads(mark.read_text()) == origin


def _merge_adapter(path: Path, cache: Path) -> None:
    """A PEFT adapter added into its base, as a model directory."""
    adapter_base = read_peft_config(path).base
    if adapter_base is None:
        raise UserError(f"adapter {path} does not say what its base is: set base_model_name_or_path in {ADAPTER}")
    directory = resolve_base(adapter_base, cache.with_name(cache.name + ".base"))
    config, weights, hf_config = load(directory)
    adapter = load_adapter(path, config, hf_config)
    whole = adapter.over(config, weights)
    merged = whole if adapter.lora is None else merge_lora(whole, adapter.lora)
    tokenizer = path if _has_tokenizer(path) else directory
    save(cache, config, merged, hf_config, tokenizer, origin=directory)


def _view(url: str, cache: Path, weights: bool) -> Path:
    """A local directory with the small files of a remote one, and an index that names its weights where they are.

    Nothing is written where it would be what is there: a run that continues must find the base as it was.
    """
    import fsspec

    try:
        system, root = fsspec.url_to_fs(url)
        found = {Path(entry["name"]).name: entry["size"] for entry in system.ls(root, detail=True)}
        files = {name: system.cat_file(f"{root}/{name}") for name in sorted(found) if name in _SMALL_FILES}
    except (OSError, ImportError, ValueError) as error:
        raise UserError(
            f"base {url} cannot be read ({type(error).__name__}: {error}): check the address and your credentials"
        ) from error
    weight_map = {}
    if SINGLE in found:
        weight_map = dict.fromkeys(SafetensorsFile(f"{url}/{SINGLE}").tensors, SINGLE)
    elif INDEX in files:
        weight_map = json.loads(files[INDEX])["weight_map"]
    elif weights:
        raise UserError(f"base {url} has no weights (no {SINGLE}): give a whole model directory")
    sizes = {file: found.get(file) for file in sorted(set(weight_map.values()))}
    index = {"metadata": {"sizes": sizes}, "weight_map": {name: f"{url}/{file}" for name, file in weight_map.items()}}
    if weight_map:
        files[INDEX] = json.dumps(index).encode()
    if cache.is_dir() and {path.name: path.read_bytes() for path in cache.iterdir()} == files:
        return cache
    with atomic_directory(cache) as out:
        for name, content in files.items():
            (out / name).write_bytes(content)
    return cache
