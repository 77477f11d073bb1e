"""Data sets by name: of TFDS, and of the library `datasets`, on the hub or in a local directory."""

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cpt_jax.core.errors import UserError, nearest
from cpt_jax.data.files import WHOLE, Stretch

PREFIXES = ("tfds:", "hf:")
# Of a data set whose records can be counted but not weighed.
RECORDS_A_SPLIT = 100_000


def is_catalogued(spec: str) -> bool:
    """hf:// is an address of files, as s3:// is."""
    return spec.startswith(PREFIXES) and "://" not in spec


def name_and_split(spec: str) -> tuple[str, str | None]:
    """Of `tfds:NAME[:SPLIT]` and `hf:NAME_OR_DIR[:SPLIT]`; a config is part of the name."""
    name, _, split = spec.partition(":")[2].partition(":")
    return name, split or None


def named_records(spec: str, stretch: Stretch = WHOLE) -> Iterator[dict]:
    """The records of a named data set, or of a stretch of it, as `named_stretches` cuts it.

    Raises:
      UserError: there is no such data set or no such split, or a package is missing.
    """
    source: Any = _source(spec)
    if spec.startswith("tfds:"):
        for index in range(stretch[0], len(source) if stretch[1] is None else stretch[1]):
            yield {key: _text(value) for key, value in source[index].items()}
        return
    if stretch == WHOLE:
        yield from source
    elif _counted(source):
        yield from source.select(range(stretch[0], stretch[1] or len(source)))
    else:
        for shard in range(stretch[0], stretch[1] or source.num_shards):
            yield from source.shard(source.num_shards, shard)


def _text(value: Any) -> Any:
    """TFDS gives text as bytes; what is no text (an image beside it) stays as it is."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def named_stretches(spec: str) -> list[Stretch]:
    """A named data set cut into stretches: of a fixed number of records, or, where it is streamed, of one of its files;
    a part of what is streamed is one stretch, since where its records are is known only by reading those before."""
    source = _source(spec)
    if not _counted(source):
        if "[" in (name_and_split(spec)[1] or ""):
            return [WHOLE]
        return [(shard, shard + 1) for shard in range(source.num_shards)]
    count = len(source)
    return [(start, min(start + RECORDS_A_SPLIT, count)) for start in range(0, max(1, count), RECORDS_A_SPLIT)]


def named_state(spec: str) -> list:
    """What tells whether a named data set is still the one that was read, as far as it can be told: local files' names,
    sizes and times."""
    path = Path(name_and_split(spec)[0]).expanduser()
    if not path.is_dir():
        return [spec]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [spec, *([str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


def _source(spec: str) -> Any:
    return _tfds_source(spec) if spec.startswith("tfds:") else _hf_source(spec)


def _counted(source: Any) -> bool:
    return hasattr(source, "__len__")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".:")


def _tfds_source(spec: str) -> Sequence[Any]:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    name, split = name_and_split(spec)
    path = Path(name).expanduser()
    # Of the catalogue: NAME or NAME/CONFIG.
    if not path.is_dir() and (name.startswith((".", "~", "/")) or name.count("/") > 1):
        raise UserError(
            f"{spec}: there is no directory {path}: give one that TFDS has prepared, as in tfds:DIR/NAME/1.0.0"
        )
    try:
        # A data source reads ArrayRecord without TensorFlow; as_dataset would need it.
        builder: Any = tfds.builder_from_directory(str(path)) if path.is_dir() else _tfds_builder(name)
    except DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        raise UserError(
            f"{spec}: TFDS has no data set {nearest(name.partition('/')[0], known)}: give another name"
        ) from error
    except Exception as error:
        raise UserError(f"{spec}: TFDS cannot open it ({_first_line(error)}): check the name and its config") from error
    splits = list(builder.info.splits)
    if not splits:
        raise UserError(
            f"{spec} is not prepared in {builder.data_dir}: prepare it with TFDS "
            '(download_and_prepare(file_format="array_record")) first'
        )
    _check_split(spec, split or "train", splits)
    try:
        return builder.as_data_source(split=split or "train")
    except Exception as error:
        raise UserError(
            f"{spec}: TFDS cannot read it without TensorFlow ({_first_line(error)}): prepare it as ArrayRecord "
            '(download_and_prepare(file_format="array_record"))'
        ) from error


def _tfds_builder(name: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder(name, try_gcs=False)


def _check_split(spec: str, split: str, splits: Sequence[str]) -> None:
    """A split may be a part, as in train[:10%], or a sum of them."""
    for part in split.split("+"):
        if (name := part.partition("[")[0].strip()) not in splits:
            raise UserError(f"{spec} has no split {nearest(name, splits)}: it has {', '.join(splits)}")


def _hf_source(spec: str) -> Any:
    try:
        import datasets  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise UserError(f"{spec} needs the package datasets: pip install datasets") from error
    name, split = name_and_split(spec)
    split, first, end = _part(spec, split)
    path = Path(name).expanduser()
    with _opened(spec):
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            source = datasets.load_from_disk(str(path))
            if not isinstance(source, dict):
                if split is not None:
                    raise UserError(f"{spec}: {path} was saved without splits: leave out ':{split}'")
                return source
        else:
            source = _streamed(spec, str(path) if path.exists() else name)
        _check_split(spec, split or "train", list(map(str, source)))
        source = source[split or "train"]
        if (first, end) == WHOLE:
            return source
        if _counted(source):
            return source.select(range(first, len(source) if end is None else min(end, len(source))))
        source = source.skip(first)
        return source if end is None else source.take(max(0, end - first))


def _part(spec: str, split: str | None) -> tuple[str | None, int, int | None]:
    """A split's name, and which of its records: SPLIT, SPLIT[:1000], SPLIT[1000:2000]."""
    if split is None:
        return (None, *WHOLE)
    found = re.fullmatch(r"([^\[+]+)(?:\[(\d*):(\d*)\])?", split)
    if found is None:
        raise UserError(f"{spec}: {split!r} is not a split, nor a part of one by records, as in train[:100000]")
    name, first, end = found.groups()
    return name, int(first or 0), int(end) if end else None


def _streamed(spec: str, name: str) -> Any:
    """The splits of a directory of files or of a data set of the hub, ORG/NAME or ORG/NAME/CONFIG."""
    import datasets  # type: ignore[import-not-found]

    hub_id, config = (name.rpartition("/")[::2]) if not Path(name).exists() and name.count("/") == 2 else (name, None)
    try:
        return datasets.load_dataset(hub_id, config, streaming=True)
    except ValueError as error:
        configs = datasets.get_dataset_config_names(hub_id)
        if config in configs or configs == ["default"]:
            raise
        some = ", ".join(configs[:20]) + (f" and {len(configs) - 20} more" if len(configs) > 20 else "")
        wrong = "needs a config" if config is None else f"has no config {nearest(config, configs)}"
        raise UserError(f"{spec} {wrong}, as in hf:{hub_id}/{configs[0]}: it has {some}") from error


@contextlib.contextmanager
def _opened(spec: str) -> Iterator[None]:
    """What the hub's libraries say while they try again is kept quiet, and how it ends is told in one line."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        remedy = "check the name, that it is public or that you are logged in (hf auth login), and the network"
        raise UserError(f"{spec} cannot be opened ({_first_line(error)}): {remedy}") from error
    finally:
        logger.setLevel(level)
