"""What the base model's own modules read, shown while it runs without any adapter.

Hooks only, gone when the block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from expertmix.experts.places import Place
from expertmix.experts.silence import silenced

See = Callable[[str, Tensor], None]
"""Called with a module's name and its (…, D) input."""


@contextmanager
def showing(places: Sequence[Place], see: See) -> Iterator[None]:
    """Show every input of these modules; PEFT's own adapters rest meanwhile."""
    with ExitStack() as stack:
        wrappers = [place.wrapper for place in places if place.wrapper is not None]
        stack.enter_context(silenced(wrappers))
        for place in places:
            stack.callback(_hook(place, see))
        yield


def _hook(place: Place, see: See) -> Callable[[], None]:
    def show(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(place.name, args[0])

    return place.linear.register_forward_pre_hook(show).remove


def read(model: nn.Module, texts: Iterable[Tensor]) -> None:
    """Run a model over token ids, each (B, S) without padding."""
    with torch.no_grad():
        for ids_BS in texts:
            model(ids_BS)
