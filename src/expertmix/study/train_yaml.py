"""YAML as a frozen dataclass: every key known, every value of its type, before anything is loaded.

Knows dataclasses and YAML; not what a setting means.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from expertmix.errors import ConfigError

Made = TypeVar("Made")

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false",
          Path: "a path", dict: "a section of keys"}  # fmt: skip


class _Loader(yaml.SafeLoader):
    """YAML's own, except that a key may stand only once."""


def _unique(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in found:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: {key!r} is given twice")
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file.

    Raises:
        ConfigError: No such file, not YAML, a key twice, or no keys at its top.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as problem:
        raise ConfigError(f"there is no config {path}") from problem
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"cannot read {path}: {problem}") from problem
    try:
        found = yaml.load(text, _Loader)
    except yaml.YAMLError as problem:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(problem).split())}") from problem
    except ConfigError as problem:
        raise ConfigError(f"{path}, {problem}") from problem
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no settings: write KEY: VALUE, one a line")
    return found


def made(kind: type[Made], given: Mapping[Any, Any], where: str = "") -> Made:
    """A dataclass from what was given; sections of keys become the dataclasses that they stand for.

    Args:
        kind: A dataclass.
        given: Key to value.
        where: In which section, for messages; ends with a dot.

    Raises:
        ConfigError: An unknown, missing or mistyped key; the message says which.
    """
    hints = get_type_hints(kind)
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise unknown_key(f"{where}{key}", str(key), known)
    missing = [
        name
        for name, one in known.items()
        if name not in given and one.default is MISSING and one.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(f"{where}{missing[0]} is missing: give it")
    return kind(**{key: _converted(given[key], hints[key], f"{where}{key}") for key in given})


def unknown_key(shown: str, key: str, known: Any) -> ConfigError:
    """The error for a key that nobody knows, with the name that it may have meant."""
    near = get_close_matches(key, [str(name) for name in known], n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(map(str, known))}"
    return ConfigError(f"unknown key {shown}: {hint}")


def _converted(value: Any, hint: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(value, args, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: {value!r} is unknown; give one of {_listed(args)}")
        return value
    if origin is tuple:
        return _tuple(value, args, where)
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is a section of keys, got {value!r}")
        return made(hint, value, f"{where}.")
    found = _plain(value, origin or hint)
    if found is None:
        raise ConfigError(f"{where} must be {_words(hint)}, got {value!r}")
    return found


def _one_of(value: Any, hints: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in hints:
        return None
    hints = tuple(hint for hint in hints if hint is not type(None))
    if len(hints) == 1:
        return _converted(value, hints[0], where)
    section = next((hint for hint in hints if is_dataclass(hint)), None)
    if section is not None and isinstance(value, Mapping):
        return _converted(value, section, where)
    for hint in hints:
        try:
            return _converted(value, hint, where)
        except ConfigError:
            continue
    raise ConfigError(f"{where} must be {' or '.join(map(_words, hints))}, got {value!r}")


def _tuple(value: Any, args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    """`tuple[X, ...]` takes one X, too; `tuple[X, Y]` two values."""
    several = value if isinstance(value, list) else [value]
    if args[-1] is Ellipsis:
        return tuple(_converted(one, args[0], where) for one in several)
    if len(several) != len(args):
        raise ConfigError(f"{where} must be {len(args)} values, got {value!r}")
    return tuple(_converted(one, hint, where) for one, hint in zip(several, args, strict=True))


def _plain(value: Any, kind: Any) -> Any:
    """The value as that type, or None. YAML reads 3e-4 as text, and true is no number."""
    if kind is Any:
        return value
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return None
    if kind is Path and isinstance(value, str) and value.strip():
        return Path(value)
    if kind is int and isinstance(value, bool):
        return None
    return value if isinstance(value, kind) else None


def _words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {_listed(args)}"
    if origin is tuple:
        return f"a list, each {_words(args[0])}"
    return "a section of keys" if is_dataclass(hint) else _WORDS.get(origin or hint, str(hint))


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values))
