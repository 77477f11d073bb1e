"""An experiment: a function that returns runs, recipes with different names."""

import dataclasses
import importlib
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpt_jax.core.errors import UserError, nearest
from cpt_jax.recipe.recipe import Recipe

Runs = dict[str, Recipe]


def find_experiment(name: str) -> Runs:
    """The runs of an experiment by their names, from `module:function`, or from a function of `experiments/`.

    Raises:
      UserError: there is none of that name (the nearest one is named), or it returns no runs.
    """
    return named_runs(find_function(name, "experiment", "experiments", _returns_recipes, annotated=False)(), name)


def find_function(
    name: str, what: str, package: str, wanted: Callable[[Any], bool], *, annotated: bool = True
) -> Callable[[], Any]:
    """The user's function that a command is given: `module:function`, or a bare name from the modules of `package`.

    They are the user's own files: they are looked for from the directory the command is called in.

    Args:
      what: how it is called in errors.
      wanted: whether a function may be meant; of a module that is named only where it has to be `annotated`.

    Raises:
      UserError: there is none of that name (the nearest one is named).
    """
    module_name, separator, function_name = name.rpartition(":")
    if separator:
        try:
            module = _imported(module_name)
        except ModuleNotFoundError as error:
            raise UserError(f"{what} {name!r}: there is no module {error.name!r} here") from error
        functions = _functions(module, wanted if annotated else lambda function: True)
    else:
        functions = functions_of(package, wanted)
    if function_name not in functions:
        raise UserError(
            f"there is no {what} {nearest(function_name, functions)}; there are: {', '.join(sorted(functions)) or 'none'}"
        )
    return functions[function_name]


def named_runs(given: Any, experiment: str) -> Runs:
    """What an experiment returned, checked: a sequence of recipes, or recipes by name.

    Raises:
      UserError: it is no such thing, there is no run, two have the same name, or one has a hidden directory's.
    """
    if isinstance(given, Mapping):
        given = [dataclasses.replace(recipe, name=name) for name, recipe in given.items()]
    if not isinstance(given, Sequence) or not all(isinstance(recipe, Recipe) for recipe in given):
        raise UserError(f"experiment {experiment!r} returns a {type(given).__name__}: return a list of Recipes")
    if not given:
        raise UserError(f"experiment {experiment!r} returns no runs: return at least one Recipe")
    names = [recipe.name for recipe in given]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"experiment {experiment!r} has {names.count(name)} runs named {name!r}: names must differ")
        if name.startswith("."):
            raise UserError(f"experiment {experiment!r}: run name {name!r}: give one that does not begin with '.'")
    return {recipe.name: recipe for recipe in given}


def _imported(module: str) -> Any:
    """A module of the user's, from the directory the command is called in."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(module)


def _functions(module: Any, wanted: Callable[[Any], bool]) -> dict[str, Callable[[], Any]]:
    """A module's own functions that need no arguments."""
    found = {}
    for name, function in inspect.getmembers(module, inspect.isfunction):
        required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
        if function.__module__ == module.__name__ and not name.startswith("_") and not required and wanted(function):
            found[name] = function
    return found


def functions_of(package: str, wanted: Callable[[Any], bool]) -> dict[str, Callable[[], Any]]:
    """Those of all modules of a package that is looked for from here; none where there is no such package."""
    try:
        path = _imported(package).__path__
    except ModuleNotFoundError:
        return {}
    found = {}
    for module in pkgutil.iter_modules(path):
        found |= _functions(importlib.import_module(f"{package}.{module.name}"), wanted)
    return found


def _returns_recipes(function: Callable) -> bool:
    """Whether it is annotated to return recipes: list[Recipe], dict[str, Recipe], Sequence[Recipe], ..."""
    try:
        annotation = typing.get_type_hints(function).get("return")
    except NameError:
        return False
    return Recipe in typing.get_args(annotation)
