"""What the base model's own modules read, shown while it runs without any adapter.

Hooks only, gone when the block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from expertmix.errors import ConfigError
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
    """Run a model over token ids, each (B, S) without padding.

    Raises:
        ConfigError: One is no such tensor, or has an id that the model has no embedding for.
    """
    base: Any = model
    embedding: Tensor = base.get_input_embeddings().weight
    with torch.no_grad(), evaluating(model):
        for ids_BS in texts:
            _check(ids_BS, len(embedding))
            model(ids_BS.to(embedding.device))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, which would draw from the user's random numbers; modes come back."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _check(ids: Any, vocabulary: int) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else repr(ids)[:40]
        raise ConfigError(f"a text must be a tensor of token ids, (rows, columns): {found}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ConfigError(
            f"a text has token ids {int(ids.min())} to {int(ids.max())}, the model knows 0 to "
            f"{vocabulary - 1}: was it made by another tokenizer?"
        )
