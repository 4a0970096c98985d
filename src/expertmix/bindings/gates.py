"""The weights of routers that can be trained: `gates_of`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from expertmix.bindings.discovery import Block
from expertmix.errors import UnsupportedModelError


def gates_of(blocks: Sequence[Block]) -> tuple[Tensor, ...]:
    """The weight matrices of their routers; of a router that several ask, once.

    Raises:
        UnsupportedModelError: A router has none.
    """
    found: list[Tensor] = []
    for block in blocks:
        own = [] if block.router is None else list(block.router.parameters())
        matrices = [one for one in own if one.dim() == 2 and one.is_floating_point()]
        if not matrices:
            raise UnsupportedModelError(
                f"{block.info.site} has no router with a weight matrix that could be trained"
            )
        found += [one for one in matrices if all(one is not other for other in found)]
    return tuple(found)
