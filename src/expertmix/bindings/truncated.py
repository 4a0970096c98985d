"""A model from one layer on: the same modules, entered in the middle.

Nothing is copied but the two outer shells (the LM and the stack of layers), so the model's own
forward does everything that it does around its layers: masks, rotary tables, final norm, head.

Knows where a model keeps its layers, and nothing of what is done with it.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from expertmix.errors import UnsupportedModelError

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


class Stack:
    """The layers of a language model, and where they hang.

    Args:
        lm: A causal LM of transformers.
        site: Name of a module inside one of its layers.

    Raises:
        UnsupportedModelError: The site lies in no list of layers.
    """

    def __init__(self, lm: nn.Module, site: str) -> None:
        self.lm = lm
        found = re.match(r"(.*?)\.(\d+)\.", f"{site}.")
        modules = dict(lm.named_modules())
        if found is None or not isinstance(modules.get(found[1]), nn.ModuleList):
            raise UnsupportedModelError(
                f"{site} lies in no list of layers of {type(lm).__name__}: its late layers cannot "
                f"run alone"
            )
        self.path = found[1]
        self.layers: Any = modules[self.path]
        self.owner: Any = modules[self.path.rpartition(".")[0]]

    def index(self, site: str) -> int:
        """Number of the layer that a site lies in."""
        return int(site[len(self.path) + 1 :].split(".")[0])

    def from_layer(self, first: int) -> nn.Module:
        """The LM without the layers before `first`, at rest; `enter` says what that one gets."""
        name = self.path.rpartition(".")[2]
        owner = _shell(self.owner)
        owner.config = _cut_config(owner.config, first)
        owner._modules[name] = nn.ModuleList(list(self.layers)[first:])
        return self._around(self.lm, self.path.split(".")[:-1], owner)

    def _around(self, module: nn.Module, path: list[str], inner: nn.Module) -> nn.Module:
        if not path:
            return inner
        inside = module._modules[path[0]]
        assert inside is not None, "a path of the model's own modules"
        shell: nn.Module = _shell(module)
        shell._modules[path[0]] = self._around(inside, path[1:], inner)
        return shell


def enter(layer: nn.Module, hidden: Tensor) -> RemovableHandle:
    """Hand the hidden states to a layer, whatever the model makes of its input; a hook handle."""
    name = _first_parameter(layer)

    def swap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, name: hidden}

    return layer.register_forward_pre_hook(swap, with_kwargs=True)


def entering(layer: nn.Module, into: list[Tensor]) -> RemovableHandle:
    """Note the hidden states that a layer gets; a hook handle."""
    name = _first_parameter(layer)

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        into.append(args[0] if args else kwargs[name])

    return layer.register_forward_pre_hook(keep, with_kwargs=True)


def _first_parameter(layer: nn.Module) -> str:
    return next(iter(inspect.signature(layer.forward).parameters))


def _shell(module: nn.Module) -> Any:
    """The same module in an object of its own, which shares parts and weights, but no hooks."""
    shell = copy.copy(module)
    shell.__dict__["_modules"] = dict(module._modules)
    shell.__dict__["training"] = False
    for name in _HOOKS:
        shell.__dict__[name] = OrderedDict()
    return shell


def _cut_config(config: Any, first: int) -> Any:
    """For the layers from `first` on; per-layer lists are cut as well."""
    cut = copy.copy(config)
    count = config.num_hidden_layers
    for key, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == count:
            cut.__dict__[key] = value[first:]
    cut.__dict__["num_hidden_layers"] = count - first
    return cut
