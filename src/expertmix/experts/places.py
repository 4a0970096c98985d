"""Where on a model a shelf's adapters act: linear modules, found by name and checked by shape.

Knows transformers' and PEFT's way of nesting modules; changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from expertmix.errors import CheckpointError
from expertmix.experts.hub import is_hub_id
from expertmix.experts.passes import takes_tokens
from expertmix.experts.shelf import Shelf
from expertmix.experts.spectra import Spectra


@dataclass(frozen=True, eq=False)
class Place:
    """One module on which adapters act.

    Attributes:
        name: As in the base model, wrappers left out.
        linear: The module that computes the base's output.
        wrapper: PEFT's layer around it, or None.
    """

    name: str
    linear: nn.Module
    wrapper: nn.Module | None

    @property
    def width(self) -> int:
        """D, of the module's input."""
        found = features(self.linear)
        assert found is not None, "find_places lets linear modules pass only"
        return found[1]


def pretrained(model: nn.Module) -> nn.Module:
    """The outermost full model of transformers, or the module itself for want of one."""
    return next((module for module in model.modules() if takes_tokens(module)), model)


def find_places(model: nn.Module, shelf: Shelf) -> tuple[Place, ...]:
    """All modules at which a shelf does something, in the model's order.

    Raises:
        CheckpointError: An adapter names a module that the model lacks, that is not linear, or that
            has another shape: it belongs to another base. Or no adapter does anything.
    """
    modules = dict(model.named_modules())
    for adapter in shelf:
        _check(adapter, modules)
    wanted = frozenset(shelf.modules)
    if not wanted:
        raise CheckpointError(
            f"no adapter of the shelf does anything (B = 0): {', '.join(shelf.names)}"
        )
    return tuple(_place(path, module) for path, module in modules.items() if path in wanted)


def check_bases(model: nn.Module, shelf: Shelf) -> None:
    """Refuse adapters that were trained on a base of another name, as far as names tell.

    Only hub ids are compared, and of them the part behind the owner: a folder may have any name.

    Raises:
        CheckpointError: An adapter's config names another base.
    """
    own = str(getattr(getattr(model, "config", None), "name_or_path", ""))
    for adapter in shelf:
        if is_hub_id(own) and is_hub_id(adapter.base) and _tail(own) != _tail(adapter.base):
            raise CheckpointError(
                f"adapter {adapter.name!r} was trained on {adapter.base}, the model is {own}. If "
                f"that is meant, say any_base=True (--any-base)."
            )


def _tail(name: str) -> str:
    return name.rpartition("/")[2].lower()


def _place(path: str, module: nn.Module) -> Place:
    linear = _inner(module)
    return Place(path, linear, None if linear is module else module)


def _inner(module: nn.Module) -> nn.Module:
    """What a wrapper such as PEFT's stands for."""
    base: Any = getattr(module, "base_layer", None)
    return _inner(base) if isinstance(base, nn.Module) else module


def _check(adapter: Spectra, modules: dict[str, nn.Module]) -> None:
    for name, spectrum in adapter.modules.items():
        if name not in modules:
            raise CheckpointError(
                f"adapter {adapter.name!r} adapts module {name!r}, which the model does not have: "
                f"it was trained on another base{_named(adapter)}"
            )
        found = features(_inner(modules[name]))
        if found is None:
            raise CheckpointError(
                f"adapter {adapter.name!r} adapts module {name!r}, a "
                f"{type(_inner(modules[name])).__name__}: only linear modules can be routed"
            )
        if found != spectrum.shape:
            raise CheckpointError(
                f"adapter {adapter.name!r}, module {name!r}: it is for a weight of shape "
                f"{spectrum.shape}, the model's is {found}: trained on another base"
                f"{_named(adapter)}"
            )


def _named(adapter: Spectra) -> str:
    return f" ({adapter.base})" if adapter.base else ""


def features(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear module, quantized and transposed (Conv1D) ones too; else None."""
    for names in (("out_features", "in_features"), ("nf", "nx")):
        sizes = tuple(_sizes(module, names))
        if len(sizes) == 2:
            return sizes[0], sizes[1]
    return None


def _sizes(module: nn.Module, names: tuple[str, str]) -> Iterator[int]:
    for name in names:
        size: Any = getattr(module, name, None)
        if isinstance(size, int):
            yield size
