"""All routers by name, and how a router is read from a config: its fields are the schema.

`Ridge` and `Calibrated` are missing on purpose: they are fitted to text, not configured.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from expertmix.errors import ConfigError
from expertmix.routers.arrow import Arrow
from expertmix.routers.fixed import Fixed
from expertmix.routers.lag import Lag
from expertmix.routers.oracle import Oracle
from expertmix.routers.router import Router
from expertmix.routers.spectr import SpectR
from expertmix.routers.uniform import Uniform

ROUTERS: dict[str, Any] = {
    "spectr": SpectR,
    "arrow": Arrow,
    "lag": Lag,
    "uniform": Uniform,
    "fixed": Fixed,
    "oracle": Oracle,
}
"""Name in a config -> class."""


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
                f"router {kind!r} has no setting {key!r}{_near(key, allowed)}; "
                f"it has {_list(allowed) or 'none'}"
            )
    try:
        router: Router = made(**settings)
    except TypeError as problem:
        raise ConfigError(f"router {kind!r}: {problem}") from problem
    return router


def _list(names: Any) -> str:
    return ", ".join(names)


def _near(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
