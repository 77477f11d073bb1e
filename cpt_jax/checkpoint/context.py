"""A longer context, in the files of a model."""

import json
from pathlib import Path

from cpt_jax.adapt import Context
from cpt_jax.checkpoint.hf import read_config
from cpt_jax.checkpoint.hf_write import write_config
from cpt_jax.core.storage import write_json_atomic


def lengthen(directory: Path, context: Context) -> None:
    """Changes what the files of a model, or of a tokenizer alone, say of its context."""
    if (directory / "config.json").exists():
        write_config(directory, context.over(read_config(directory)))
    if (file := directory / "tokenizer_config.json").exists():
        fields = json.loads(file.read_text(encoding="utf-8"))
        if fields.get("model_max_length", context.length) < context.length:
            write_json_atomic(file, fields | {"model_max_length": context.length})
