"""A model directory's files under another name."""

import os
import shutil
from pathlib import Path

from cpt_jax.core.storage import atomic_directory


def copy_tokenizer(source: Path, out: Path) -> None:
    """What belongs to the tokenizer, without weights and configurations."""
    with atomic_directory(out) as directory:
        for path in source.iterdir():
            if (
                path.is_file()
                and path.suffix in (".json", ".jinja", ".txt", ".model")
                and "safetensors" not in path.name
            ) and path.name not in ("config.json", "generation_config.json"):
                shutil.copyfile(path, directory / path.name)


def link_directory(source: Path, out: Path) -> None:
    """The same files under another name, without a copy where the file system can do that."""
    with atomic_directory(out) as directory:
        for path in source.iterdir():
            if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model", ".safetensors"):
                try:
                    os.link(path.resolve(), directory / path.name)
                except OSError:
                    shutil.copyfile(path, directory / path.name)
