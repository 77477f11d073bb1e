"""Frozen dataclasses as JSON and back, overrides by path, and what differs between two of them."""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from cpt_jax.core.errors import UserError, nearest

Config = TypeVar("Config")
KIND = "kind"


def to_json(config: Any) -> Any:
    """Plain JSON values; each dataclass carries its class's name under "kind"."""
    if dataclasses.is_dataclass(config):
        fields = {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
        return {KIND: type(config).__name__, **fields}
    if isinstance(config, Mapping):
        return {key: to_json(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_json(value) for value in config]
    # JSON has no word for infinity (a stage that saves by no clock: checkpoint_seconds).
    return str(config) if isinstance(config, float) and not math.isfinite(config) else config


def from_json(annotation: Any, value: Any, where: str = "config") -> Any:
    """The value of the annotated type that `to_json` made this of.

    Raises:
      UserError: a field is unknown, missing or of another type; the nearest name is given.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return _union_from_json(arguments, value, where)
    if dataclasses.is_dataclass(annotation):
        return _dataclass_from_json(annotation, value, where)
    if origin is tuple:
        _check(isinstance(value, list), where, value, "a list")
        return tuple(from_json(arguments[0], item, f"{where}.{index}") for index, item in enumerate(value))
    if origin is dict:
        _check(isinstance(value, dict), where, value, "an object")
        return {key: from_json(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal:
        _check(value in arguments, where, value, "one of " + ", ".join(map(str, arguments)))
        return value
    if annotation is float and value in ("inf", "-inf", "nan"):
        return float(value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _check(type(value) is annotation, where, value, f"a value of type {annotation.__name__}")
    return value


def _union_from_json(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    classes = {_name(choice): choice for choice in choices if dataclasses.is_dataclass(choice)}
    plain_objects = [choice for choice in choices if typing.get_origin(choice) is dict]
    # One of the choices may be a plain object, whose names are the user's.
    if plain_objects and isinstance(value, dict) and not isinstance(value.get(KIND), str):
        return from_json(plain_objects[0], value, where)
    if classes and isinstance(value, dict):
        kind = value.get(KIND, "")
        _check(kind in classes, where, kind, "one of " + ", ".join(classes))
        return from_json(classes[kind], value, where)
    if classes:
        # On a command line the whole object is one argument.
        objects = ['{"NAME": ..., ...}'] * bool(plain_objects) + [f'{{"kind": "{name}", ...}}' for name in classes]
        _check(False, where, value, " or ".join(objects) + (", or null" if type(None) in choices else ""))
    (plain,) = [choice for choice in choices if choice is not type(None)]
    return from_json(plain, value, where)


def _name(choice: Any) -> str:
    return choice.__name__


def _dataclass_from_json(cls: Any, value: Any, where: str) -> Any:
    _check(isinstance(value, dict), where, value, f"an object ({cls.__name__})")
    annotations = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given = {name: item for name, item in value.items() if name != KIND}
    for name in given:
        if name not in fields:
            raise UserError(f"{where} has no field {nearest(name, fields)}")
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in given and not has_default:
            raise UserError(f"{where} lacks the field {name!r} of {cls.__name__}")
    return cls(**{name: from_json(annotations[name], item, f"{where}.{name}") for name, item in given.items()})


def _check(good: bool, where: str, value: Any, expected: str) -> None:
    if not good:
        raise UserError(f"{where} is {value!r}: give {expected}")


def override(config: Config, *changes: tuple[str, str]) -> Config:
    """A copy with the values at dotted paths replaced, their texts read as JSON where that is what the fields hold.

    `override(recipe, ("stages.1.optimizer.learning_rate", "1e-3"))`: digits index tuples; `null` or `none` takes away
    what is optional; an object replaces a group; what has a `parse` is also read from one word (`("stages.1.remat", "products")`). What the changes make together is checked, so that their order does not matter.

    Raises:
      UserError: no such name (the nearest is given), or a value that does not fit.
    """
    document, top = to_json(config), type(config).__name__.lower()
    for path, text in changes:
        _replace(document, type(config), path, text, top)
    return from_json(type(config), document, top)


def _replace(document: Any, annotation: Any, path: str, text: str, top: str) -> None:
    *parents, last = path.split(".")
    node, walked = document, []
    for name in parents:
        key = _key(node, name, walked)
        node, annotation = node[key], _held(annotation, node, key)
        walked.append(name)
    key = _key(node, last, walked)
    current, annotation = node[key], _held(annotation, node, key)
    optional = type(None) in typing.get_args(annotation)
    if optional and text.lower() in ("null", "none"):
        node[key] = None
    elif (kind := _of_one_word(annotation)) is not None and not text.startswith("{"):
        node[key] = to_json(kind.parse(text))
    elif isinstance(current, dict) and not text.startswith("{"):
        names = ", ".join(name for name in current if name != KIND)
        given = f"one of its fields ({names}), or the whole as JSON"
        raise UserError(f"override {path!r} names a group: give {given}{', or null, which takes it away' * optional}")
    else:
        number = float in (annotation, *typing.get_args(annotation))
        value = text if isinstance(current, str) and not number else _parse(text)
        # There and back, so that an object has the fields that were not given: a later change may be of one of them.
        node[key] = to_json(from_json(annotation, value, f"{top}.{path}"))


def _of_one_word(annotation: Any) -> Any:
    """The dataclass that a field holds, if it can be written as one word."""
    return next((choice for choice in (annotation, *typing.get_args(annotation)) if hasattr(choice, "parse")), None)


def _held(annotation: Any, node: Any, key: Any) -> Any:
    """The annotation of what a node, the JSON of a value of the annotated type, holds at a key."""
    union = typing.get_origin(annotation) in (Union, types.UnionType)
    choices = typing.get_args(annotation) if union else (annotation,)
    for choice in choices:
        if dataclasses.is_dataclass(choice) and isinstance(node, dict) and node.get(KIND) == _name(choice):
            return typing.get_type_hints(choice)[key]
    kind = tuple if isinstance(node, list) else dict
    (inner,) = (typing.get_args(choice) for choice in choices if typing.get_origin(choice) is kind)
    return inner[0] if kind is tuple else inner[1]


def _key(node: Any, name: str, walked: list[str]) -> Any:
    where = ".".join(walked) or "the top"
    if isinstance(node, list):
        if not name.isdigit() or int(name) >= len(node):
            raise UserError(f"override: {where} has entries 0 to {len(node) - 1}, not {name!r}")
        return int(name)
    if name == KIND and isinstance(node, dict) and KIND in node:
        raise UserError(
            f'override: the kind of {where}, {node[KIND]}, changes with the whole: give {{"kind": "NAME", ...}}'
        )
    names = [key for key in node if key != KIND] if isinstance(node, dict) else []
    if name not in names:
        raise UserError(
            f"override: there is no {nearest(name, names)} at {where}; there are: {', '.join(names) or 'no fields'}"
        )
    return name


def _parse(text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        try:
            value = float(text)
        except ValueError:
            return {"True": True, "False": False, "None": None}.get(text, text)
    # 1e6 may be meant for a whole number; a field that is none takes both.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Of each dotted path as few of its last parts as no other one ends with, and not a number alone."""
    names = {}
    for path in paths:
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[-length:])
            if sum(other == name or other.endswith("." + name) for other in paths) == 1 and not name.isdigit():
                break
        names[path] = name
    return names


def differences(saved: Any, given: Any, where: str = "") -> list[str]:
    """What differs between two JSON documents, a line each: "stages.1.tokens: 120 in the work directory, 200 given"."""
    if isinstance(saved, dict) and isinstance(given, dict):
        names = list(saved) + [name for name in given if name not in saved]
        pairs = [(name, saved.get(name), given.get(name)) for name in names]
    elif isinstance(saved, list) and isinstance(given, list) and len(saved) == len(given):
        pairs = [(str(index), a, b) for index, (a, b) in enumerate(zip(saved, given, strict=True))]
    elif saved == given:
        return []
    else:
        return [f"{where}: {_short(saved)} in the work directory, {_short(given)} given"]
    return [line for name, a, b in pairs for line in differences(a, b, f"{where}.{name}" if where else name)]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def fingerprint(document: Any) -> str:
    """SHA-256 of a JSON document, independent of its keys' order, and of whether a whole number has a point (a recipe's
    alpha=8 comes back from its file as 8.0)."""
    text = json.dumps(_plain(document), sort_keys=True, ensure_ascii=False)
    # The name of a file that is no UTF-8 has halves of pairs in it.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _plain(document: Any) -> Any:
    if isinstance(document, dict):
        return {name: _plain(value) for name, value in document.items()}
    if isinstance(document, list | tuple):
        return [_plain(value) for value in document]
    return int(document) if isinstance(document, float) and document.is_integer() else document
