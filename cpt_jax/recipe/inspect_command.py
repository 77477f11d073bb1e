"""`cpt model inspect`: a model's parameters, and what would train."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from cpt_jax.adapt import ByPath, Embeddings, Expand, Full, LoRA, Method, usual_blocks
from cpt_jax.checkpoint.hf import INDEX, SINGLE, load, read_config
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.stores import Location, write_json
from cpt_jax.core.tree import flatten
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.decoder import abstract_decoder
from cpt_jax.models.families import family_for
from cpt_jax.models.layer_groups import without_group
from cpt_jax.models.linear import LINEARS
from cpt_jax.optim.optimizer import OPTIMIZERS
from cpt_jax.report.tables import text_table
from cpt_jax.training.memory import stage_memory

HEADER = ("weight", "shape", "type in files", "axes", "parameters", "MB")


def model_inspect(
    directory: Path,
    *,
    method: str | None,
    rank: int,
    targets: Sequence[str],
    optimizer: str,
    new_tokens: int,
    json_path: Location | None,
) -> None:
    """Prints the configuration and the table of parameters, from config.json and the files' headers alone.

    Args:
      method: shows which weights it trains, and adds its adapters to the table; with LoRA's rank and targets, or the
        patterns of ByPath.
      optimizer: whose state is counted, by its name in `OPTIMIZERS`.
      new_tokens: rows that the vocabulary would gain.
    """
    if new_tokens < 0:
        raise UserError(f"--new-tokens is {new_tokens}: give 0 or more")
    hf_config = read_config(directory)
    config: DecoderConfig = family_for(hf_config).config_from_hf(hf_config)
    stored: dict[str, str] = {}
    if (directory / SINGLE).exists() or (directory / INDEX).exists():
        stored = {path: str(leaf.dtype) for path, leaf in flatten(load(directory)[1]).items()}
    config = dataclasses.replace(config, new_rows=new_tokens)
    trained_by = None if method is None else _method(method, rank, targets, config.num_layers)
    if trained_by is not None:
        config = trained_by.layout(config)
    groups = [name for name, _ in config.layer_groups]
    network = abstract_decoder(config, trained_by.lora_config() if trained_by is not None else None)
    shapes, axes = flatten(network.shapes), flatten(network.logical_axes)
    weights = [
        {
            "weight": path,
            "shape": list(leaf.shape),
            "dtype": stored.get(without_group(path, groups)),
            "axes": list(axes[path]),
            "parameters": leaf.size,
            "bytes": _bytes(path, leaf.size, trained_by),
            "trains": trained_by is not None and trained_by.trains(path),
        }
        for path, leaf in shapes.items()
    ]
    total, trained = (sum(row["parameters"] for row in weights if row["trains"] or not only) for only in (False, True))
    print(f"{hf_config['model_type']}, {total:,} parameters" + ("" if trained_by is None else f", {trained:,} train"))
    for field in dataclasses.fields(config):
        # Sizes, and whatever is not as in most families.
        if (value := getattr(config, field.name)) != field.default:
            print(f"  {field.name:<26}{value}")
    print(_table(weights, trained_by is not None))
    memory = sum(row["bytes"] for row in weights)
    print(f"in memory: {memory / 1e6:,.1f} MB of weights", end="")
    summary = {"model_type": hf_config["model_type"], "parameters": total, "trained": trained, "bytes": memory}
    if trained_by is not None:
        settings = OPTIMIZERS[optimizer](learning_rate=1.0)
        stage = stage_memory(network, trained_by.trains, settings, precision=Precision())
        print(f", {stage.gradients / 1e6:,.1f} MB of gradients, {stage.optimizer / 1e6:,.1f} MB of {optimizer}'s state")
        summary |= {"gradient_bytes": stage.gradients, "optimizer_bytes": stage.optimizer}
    else:
        print()
    if json_path is not None:
        write_json(json_path, summary | {"weights": weights})


def _bytes(path: str, size: int, method: Method | None) -> int:
    """Of a weight while a stage trains: what trains is float32."""
    if method is not None and method.trains(path):
        return 4 * size
    return Precision().dtype_of(path).itemsize * size


def _table(weights: Sequence[dict], with_method: bool) -> str:
    header = (*HEADER, "trains") if with_method else HEADER
    rows = [
        (
            row["weight"],
            " x ".join(map(str, row["shape"])),
            row["dtype"] or "-",
            ", ".join(row["axes"]),
            f"{row['parameters']:,}",
            f"{row['bytes'] / 1e6:,.1f}",
            *(("yes" if row["trains"] else "",) if with_method else ()),
        )
        for row in weights
    ]
    return text_table([header, *rows])


def _method(name: str, rank: int, targets: Sequence[str], layers: int) -> Method:
    """The method of `--method`, for a model of so many layers."""
    if name in ("lora", "dora"):
        return LoRA(rank=rank, alpha=2.0 * rank, targets=tuple(targets) or LINEARS, dora=name == "dora")
    if name == "by-path":
        if not targets:
            raise UserError("--method by-path trains what --targets names: give patterns, as in 'layers/mlp/*'")
        return ByPath(patterns=tuple(targets))
    if name == "expand":
        return Expand(blocks=usual_blocks(layers))
    return {"full": Full(), "embeddings": Embeddings(rows="new"), "all-embeddings": Embeddings(rows="all")}[name]
