"""Sites inside models that we do not own; `record` for whatever the user has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertmix.bindings.record import bind, record, sites

__all__ = ["bind", "record", "sites"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from expertmix.bindings import record

        return getattr(record, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
