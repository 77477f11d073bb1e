"""A model directory's files under another name."""

import os
import shutil
from pathlib import Path

from cpt_jax.core.storage import atomic_directory


def is_of_model(path: Path) -> bool:
    """Whether it is a file that a model is read from, by its suffix."""
    return path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model", ".safetensors")


def copy_tokenizer(source: Path, out: Path) -> None:
    """What belongs to the tokenizer, without weights and configurations."""
    with atomic_directory(out) as directory:
        for path in source.iterdir():
            weights = "safetensors" in path.name or path.name in ("config.json", "generation_config.json")
            if is_of_model(path) and not weights:
                shutil.copyfile(path, directory / path.name)


def link_directory(source: Path, out: Path) -> None:
    """The same files under another name, without a copy where the file system can do that."""
    with atomic_directory(out) as directory:
        for path in source.iterdir():
            if is_of_model(path):
                try:
                    os.link(path.resolve(), directory / path.name)
                except OSError:
                    shutil.copyfile(path, directory / path.name)
