"""All routers by name, and how a router is read from a config: its fields are the schema.

`Ridge` and `Calibrated` are missing on purpose: they are fitted to text, not configured.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from expertmix.errors import ConfigError
from expertmix.routers.arrow import Arrow
from expertmix.routers.fixed import Fixed
from expertmix.routers.lag import Lag
from expertmix.routers.oracle import Oracle
from expertmix.routers.pooled import Pooled
from expertmix.routers.router import Router
from expertmix.routers.spectr import SpectR
from expertmix.routers.uniform import Uniform

ROUTERS: dict[str, Any] = {
    "pooled": Pooled,
    "spectr": SpectR,
    "arrow": Arrow,
    "lag": Lag,
    "uniform": Uniform,
    "fixed": Fixed,
    "oracle": Oracle,
}
"""Name in a config -> class."""
_EXAMPLES = {"fixed": ", such as weights=NAME", "oracle": ": the name of an adapter for each row"}


def make_router(kind: str, settings: Mapping[str, Any] | None = None) -> Router:
    """A router by name.

    Args:
        kind: A key of `ROUTERS`.
        settings: Fields of that router.

    Raises:
        ConfigError: An unknown router, an unknown, missing or impossible setting.
    """
    if kind not in ROUTERS:
        raise ConfigError(f"no router {kind!r}{_near(kind, ROUTERS)}; there are {_list(ROUTERS)}")
    made = ROUTERS[kind]
    settings = {} if settings is None else dict(settings)
    allowed = [field.name for field in fields(made)]
    for key in settings:
        if key not in allowed:
            raise ConfigError(
                f"router {kind!r} has no setting {key!r}{_near(str(key), allowed)}; "
                f"it has {_list(allowed) or 'none'}"
            )
    needed = [name for name in _required(made) if name not in settings]
    if needed:
        raise ConfigError(f"router {kind!r} needs {_list(needed)}{_EXAMPLES.get(kind, '')}")
    if "inner" in settings:
        settings["inner"] = router_of(settings["inner"])
    try:
        router: Router = made(**settings)
    except (TypeError, ValueError) as problem:  # a value of another type than the setting has
        shown = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        raise ConfigError(f"router {kind!r} cannot work with {shown}: {problem}") from problem
    return router


def router_of(given: Router | str | Mapping[str, Any]) -> Router:
    """A router of itself, its name, or a mapping with its name as `kind` beside its settings.

    Raises:
        ConfigError: See `make_router`; or a mapping without `kind`.
    """
    if isinstance(given, Router):
        return given
    if isinstance(given, str):
        return make_router(given)
    if not (isinstance(given, Mapping) and "kind" in given):
        raise ConfigError(f"a router is a name, or a mapping with its name as 'kind': {given!r}")
    settings = dict(given)
    return make_router(str(settings.pop("kind")), settings)


def _required(made: Any) -> list[str]:
    parameters = inspect.signature(made).parameters.values()
    return [one.name for one in parameters if one.default is inspect.Parameter.empty]


def _list(names: Any) -> str:
    return ", ".join(names)


def _near(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
