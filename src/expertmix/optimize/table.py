"""All methods by name, and how one is read from a line or a mapping: its fields are the schema.

A method that wraps a descent takes the descent's settings as its own: `oracle steps=5`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from expertmix.errors import ConfigError
from expertmix.optimize.adaptive import Adaptive
from expertmix.optimize.context import ContextLoss
from expertmix.optimize.descent import NGD
from expertmix.optimize.global_delta import GlobalDelta
from expertmix.optimize.leave_one_out import LeaveOneOut
from expertmix.optimize.mode_finding import ModeFinding
from expertmix.optimize.oracle import Oracle, WrongOracle
from expertmix.optimize.problem import Method
from expertmix.optimize.regression import KernelRegression
from expertmix.optimize.router_tuning import RouterTuning

METHODS: dict[str, Any] = {
    "ngd": NGD,
    "kernel_regression": KernelRegression,
    "mode_finding": ModeFinding,
    "leave_one_out": LeaveOneOut,
    "adaptive": Adaptive,
    "context": ContextLoss,
    "global_delta": GlobalDelta,
    "router_tuning": RouterTuning,
    "oracle": Oracle,
    "wrong_oracle": WrongOracle,
}
"""Name on the command line -> class."""


def method_of(given: Method | str | Mapping[str, Any]) -> Method:
    """A method of itself, of a line such as `ngd steps=5 core=8`, or of a mapping.

    Args:
        given: In a mapping, `kind` is the name and all other keys are settings.

    Raises:
        ConfigError: An unknown method or setting, with the nearest known one; or an impossible
            value.
    """
    if isinstance(given, str):
        kind, *words = given.split() or [""]
        settings: dict[str, Any] = dict(_pair(word, kind) for word in words)
        return make_method(kind, settings)
    if not isinstance(given, Mapping):
        return given
    if "kind" not in given:
        raise ConfigError(f"a method is a line, or a mapping with its name as 'kind': {given!r}")
    settings = dict(given)
    return make_method(str(settings.pop("kind")), settings)


def make_method(kind: str, settings: Mapping[str, Any]) -> Method:
    """A method by name and settings; text is read as the type of its setting.

    Raises:
        ConfigError: See `method_of`.
    """
    if kind not in METHODS:
        raise ConfigError(f"no method {kind!r}{_near(kind, METHODS)}; there are {_list(METHODS)}")
    made = METHODS[kind]
    known = schema(made)
    for key in settings:
        if key not in known:
            raise ConfigError(
                f"method {kind!r} has no setting {key!r}{_near(key, known)}; it has {_list(known)}"
            )
    read = {key: _read(kind, key, value, known[key]) for key, value in settings.items()}
    return cast(Method, _build(made(), read))


def settings_of(method: Method) -> dict[str, Any]:
    """All settings of a method by name, with its name as `kind`: `method_of` reads it back."""
    return {"kind": method.name, **_values(method)}


def line_of(method: Method) -> str:
    """A line that names a method and the settings that are not its defaults."""
    usual = _values(METHODS[method.name]())
    own = [f"{key}={_text(value)}" for key, value in _values(method).items() if value != usual[key]]
    return " ".join([method.name, *own])


def schema(made: Any) -> dict[str, Any]:
    """Settings of a method class by name, with their types: its own, then its descent's."""
    hints = get_type_hints(made)
    own = {one.name: hints[one.name] for one in fields(made) if one.init}
    inner = [name for name, hint in own.items() if is_dataclass(hint)]
    nested = {key: hint for name in inner for key, hint in schema(own[name]).items()}
    return {key: hint for key, hint in {**nested, **own}.items() if key not in inner}


def _build(made: Any, settings: Mapping[str, Any]) -> Any:
    own = {one.name for one in fields(made) if one.init}
    mine = {key: value for key, value in settings.items() if key in own}
    for one in _inner(made):
        theirs = {key: value for key, value in settings.items() if key not in own}
        mine[one.name] = _build(getattr(made, one.name), theirs)
    return replace(made, **mine)


def _values(made: Any) -> dict[str, Any]:
    inner = [one.name for one in _inner(made)]
    own = {one.name: getattr(made, one.name) for one in fields(made) if one.init}
    nested = {key: value for name in inner for key, value in _values(own[name]).items()}
    return {key: value for key, value in {**nested, **own}.items() if key not in inner}


def _inner(made: Any) -> list[Field[Any]]:
    return [one for one in fields(made) if one.init and is_dataclass(getattr(made, one.name))]


def _pair(word: str, kind: str) -> tuple[str, str]:
    key, mark, value = word.partition("=")
    if not (key and mark and value):
        raise ConfigError(f"method {kind!r}: {word!r} is no setting; write name=value")
    return key, value


def _read(kind: str, key: str, value: Any, hint: Any) -> Any:
    for option in _options(hint):
        found = _as(value, option)
        if found is not MISSING:
            return found
    raise ConfigError(f"method {kind!r}: {key}={value} is not {_said(hint)}")


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _as(value: Any, hint: Any) -> Any:
    """A value as a type, MISSING where it is none."""
    if get_origin(hint) is Literal:
        return value if value in get_args(hint) else MISSING
    if get_origin(hint) is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        read = [_as(part, get_args(hint)[0]) for part in parts]
        return MISSING if MISSING in read else tuple(read)
    if hint is bool:
        return {"true": True, "false": False}.get(str(value).lower(), MISSING)
    if hint is NoneType:
        return None if value is None or str(value).lower() == "none" else MISSING
    if isinstance(value, bool) or value is None:
        return MISSING
    try:
        return hint(str(value)) if hint is int else hint(value)
    except (TypeError, ValueError):
        return MISSING


def _said(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "none"}
    return " or ".join(
        _list(map(repr, get_args(one))) if get_origin(one) is Literal
        else "numbers joined by commas" if get_origin(one) is tuple
        else words.get(one, "a text")
        for one in _options(hint)
    )  # fmt: skip


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _list(names: Any) -> str:
    return ", ".join(names)


def _near(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
