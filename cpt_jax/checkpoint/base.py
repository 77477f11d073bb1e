"""Where a base model is found: a directory, a GGUF file, a hub id, or an object store."""

import json
from pathlib import Path

from cpt_jax.checkpoint.hf import INDEX, SINGLE, TOKENIZER_FILES
from cpt_jax.checkpoint.safetensors_file import SafetensorsFile
from cpt_jax.core.errors import UserError
from cpt_jax.core.storage import atomic_directory, write_json_atomic

_SMALL_FILES = {*TOKENIZER_FILES, INDEX, "config.json", "generation_config.json"}


def resolve_base(base: str, cache: Path) -> Path:
    """A model directory: `base` itself, a .gguf file converted into `cache`, a hub id fetched to the hub's own cache,
    or in `cache` a view of a directory in an object store (gs://, s3://), whose weights stay there.

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
    if "://" in base:
        return _view(base.rstrip("/"), cache)
    if path.exists() or base.count("/") != 1 or base.startswith((".", "/", "~")):
        raise UserError(
            f"base {base!r} is neither a model directory, nor a .gguf file, nor a hub id like HuggingFaceTB/SmolLM2-135M, nor a URL like gs://bucket/model"
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


def _view(url: str, cache: Path) -> Path:
    """A local directory with the small files of a remote one, and an index that names its weights where they are."""
    import fsspec

    try:
        system, root = fsspec.url_to_fs(url)
        found = {Path(entry).name for entry in system.ls(root, detail=False)}
        small = {name: system.cat_file(f"{root}/{name}") for name in sorted(found) if name in _SMALL_FILES}
    except (OSError, ImportError, ValueError) as error:
        raise UserError(
            f"base {url} cannot be read ({type(error).__name__}: {error}): check the address and your credentials"
        ) from error
    with atomic_directory(cache) as out:
        for name, content in small.items():
            (out / name).write_bytes(content)
        if SINGLE in found and INDEX not in found:
            names = SafetensorsFile(f"{url}/{SINGLE}").tensors
            weight_map = dict.fromkeys(names, SINGLE)
        elif INDEX in found:
            weight_map = json.loads(small[INDEX])["weight_map"]
        else:
            raise UserError(f"base {url} has no weights (no {SINGLE}): give a whole model directory")
        remote = {name: f"{url}/{file}" for name, file in weight_map.items()}
        write_json_atomic(out / INDEX, {"metadata": {}, "weight_map": remote})
    return cache
