"""From what is typed on the command line to a recipe, or to a model."""

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from cpt_jax.checkpoint.base import resolve_base
from cpt_jax.checkpoint.hf import read_config
from cpt_jax.core.config import from_json, override
from cpt_jax.core.errors import UserError, nearest
from cpt_jax.core.stores import Store, fetched, is_address, location, refusals_are_told
from cpt_jax.recipe.experiment import find_experiment, find_function, functions_of
from cpt_jax.recipe.recipe import Recipe

# Where a model that is no directory yet (GGUF, adapter, remote) is unpacked when a command has no work directory.
CACHE = Path(".cache/models")


def find_model(name: str) -> Path:
    """A model's HF directory from a directory, a run (its export), a .gguf file, a PEFT adapter, a hub id or a URL.

    Raises:
      UserError: there is none, or the run has no export yet.
    """
    name = model_named(name)
    return resolve_base(name, _cache_of(name))


def model_named(name: str) -> str:
    """A model's name as it is, and that of a run's export for the run.

    Raises:
      UserError: the run has no export yet.
    """
    if is_address(name):
        return _stored_model(name.rstrip("/"))
    path = Path(name).expanduser()
    config = path / "config.json"
    # A run's config.json is its recipe.
    if config.is_file() and "stages" in read_config(path):
        if not (path / "export").exists():
            raise UserError(
                f"{name} is a run without an export: finish it with `cpt run {config} --workdir {path}`, or give a model's directory"
            )
        return str(path / "export")
    return name


def find_tokenizer(name: str) -> Path:
    """A directory with a tokenizer's files, from the same as a model's, or from one that has no weights.

    Raises:
      UserError: there is none.
    """
    path = Path(name).expanduser()
    return path if path.is_dir() else resolve_base(name, _cache_of(name), weights=False)


def _cache_of(name: str) -> Path:
    return CACHE / f"{Path(name).stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _stored_model(address: str) -> str:
    """The address itself, or, of a run, its export's."""
    store = Store(address)
    with refusals_are_told(address):
        config = store.read("config.json")
        if config is None or "stages" not in json.loads(config):
            return address
        if store.read("export/config.json") is None:
            raise UserError(f"{address} is a run without an export: finish it, or give a model's directory")
    return f"{address}/export"


def find_recipe(name: str) -> Recipe:
    """A recipe from `module:function`, from a function of `configs/`, from a saved `config.json`, or a run of an experiment
    (EXPERIMENT/RUN).

    Raises:
      UserError: there is none of that name (the nearest one is named), or it is no recipe.
    """
    if name.endswith(".json"):
        with fetched(location(name)) as path:
            if not path.exists():
                raise UserError(f"{path} does not exist: give the config.json of a run's directory")
            return saved_recipe(path.read_text(encoding="utf-8"), name)
    if (Path(name) / "config.json").is_file():
        raise UserError(
            f"{name} is a directory: give its recipe, {name}/config.json, and --workdir {name} to go on there"
        )
    if name.endswith(".py"):
        module = ".".join(Path(name).with_suffix("").parts)
        raise UserError(f"{name} is a file: give its module and a function of it, as in {module}:FUNCTION")
    if "/" in name:
        experiment, _, run = name.partition("/")
        runs = find_experiment(experiment)
        if run not in runs:
            raise UserError(f"experiment {experiment!r} has no run {nearest(run, runs)}; it has: {', '.join(runs)}")
        return runs[run]
    return find_function(name, "recipe", "configs", _returns_recipe)()


def names_one_recipe(name: str) -> bool:
    """Whether it is a saved recipe's file, or a function of `configs/`."""
    return name.endswith(".json") or name in functions_of("configs", _returns_recipe)


def saved_recipe(text: str, place: str) -> Recipe:
    """The recipe that a run's config.json holds.

    Raises:
      UserError: the text is no JSON, or no recipe's.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place} is not JSON (line {error.lineno}): give the config.json of a run's directory"
        ) from error
    if not isinstance(document, dict) or "stages" not in document:
        raise UserError(f"{place} holds no recipe (but a model's?): give the config.json of a run's directory")
    return from_json(Recipe, document)


def _returns_recipe(function: Callable) -> bool:
    return inspect.signature(function).return_annotation in (Recipe, "Recipe")


def apply_overrides(recipe: Recipe, arguments: Sequence[str]) -> Recipe:
    """Applies `--stages.1.optimizer.learning_rate 1e-3` (or `--seed=1`) to a recipe.

    Raises:
      UserError: a name that does not exist (the nearest is named), or a value of another type.
    """
    return override(recipe, *overrides_of(arguments))


def overrides_of(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Paths and values of what is written `--stages.1.optimizer.learning_rate 1e-3` or `--seed=1`.

    Raises:
      UserError: a word that is none, or a name without a value.
    """
    found, rest = [], list(arguments)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--"):
            raise UserError(f"{name!r} is no override: write --FIELD VALUE, as in --stages.0.tokens 20000")
        name, separator, value = name[2:].partition("=")
        if not separator:
            if not rest:
                raise UserError(f"override --{name} lacks its value")
            value = rest.pop(0)
        found.append((name.replace("-", "_"), value))
    return found
