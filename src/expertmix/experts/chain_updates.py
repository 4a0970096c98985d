"""How much each iteration of a chain changes: `update_norms`, hooks for the length of a block.

The effective depth of a chain: an iteration whose update is tiny adds none. Measures what the
iterations give, F_t(x_{t-1}) with its scale, before any residual; it changes nothing, and knows
nothing of who was called.

Legend: T tokens of a pass, H hidden size, G groups of texts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertmix.core.by_text import GROUPS, add_to_groups, group_of, ratio
from expertmix.core.estimate import Estimate
from expertmix.core.tokens import Bookkeeper, Tokens
from expertmix.errors import NoSitesError, UnsupportedRuntimeError
from expertmix.experts.chain import Chain, Iteration, relative_size
from expertmix.experts.passes import full_models, read_inputs

_SIZE, _COSINE = 0, 1


@dataclass(frozen=True, slots=True)
class LayerUpdates:
    """The updates of one chain, over real tokens that had not halted.

    Attributes:
        name: The layer's module, as in the names of its sites.
        size: Per iteration t, mean of ‖F_t‖ / ‖x_{t-1}‖, with an interval over texts.
        cosine: Per iteration but the last, mean cosine of F_t and F_{t+1}; near -1, the next takes
            back what this one gave. Tokens with an update of zero are left out; nan without any.
    """

    name: str
    size: tuple[Estimate, ...]
    cosine: tuple[Estimate, ...]


def chains_in(model: nn.Module) -> dict[str, Chain]:
    """The chains of a model by name; none of any other model."""
    return {name: one for name, one in model.named_modules() if isinstance(one, Chain)}


@contextmanager
def update_norms(model: nn.Module) -> Iterator[UpdateMeter]:
    """Measure every pass through a model inside the block; the hooks are gone afterwards.

    Costs two norms and a product per iteration and token. Passes recomputed in a backward (gradient
    checkpointing) count once. Padding is told by the attention mask, as in a recording.

    Args:
        model: A model of transformers with chains in it.

    Yields:
        The meter, which fills as the model runs.

    Raises:
        NoSitesError: The model has no chain.
        UnsupportedModelError: It is no full model, so texts and padding cannot be told.

    Example:
        >>> with update_norms(model) as meter:
        ...     model(**inputs)
        >>> meter.layers[0].size  # an Estimate per iteration
    """
    found = chains_in(model)
    if not found:
        raise NoSitesError(
            f"{type(model).__name__} has no chain of experts: updates of iterations are measured "
            f"in Chain-of-Experts models (`expertmix convert MODEL --to coe` makes one)"
        )
    meter = UpdateMeter(tuple(found))
    with ExitStack() as stack:
        for full in full_models(model, found):
            _hook_pass(full, meter, stack)
        for name, chain in found.items():
            for iteration in chain.iterations:
                assert isinstance(iteration, Iteration)
                hook = iteration.register_forward_hook(_seen(name, meter))
                stack.callback(hook.remove)
        yield meter


class UpdateMeter:
    """Adds up what the iterations give.

    Args:
        names: Of the chains, in the model's order.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._bookkeeper = Bookkeeper()
        self._tokens: Tokens | None = None
        self._opener: nn.Module | None = None
        self._before: dict[str, Tensor] = {}
        self._sums: dict[tuple[str, int, int], _Mean] = {}

    @property
    def layers(self) -> tuple[LayerUpdates, ...]:
        """What was measured so far; chains that did not run are not among them."""
        found = (
            LayerUpdates(name, self._estimates(name, _SIZE), self._estimates(name, _COSINE))
            for name in self._names
        )
        return tuple(layer for layer in found if layer.size)

    def begin(self, opener: nn.Module, given: dict[str, Any]) -> None:
        """A pass starts, unless one is running; one that broke off without a word is forgotten."""
        if self._opener in (None, opener):
            ids_BS, real_BS, past = read_inputs(given)
            self._tokens = self._bookkeeper.read(ids_BS, real_BS, past=past).tokens.cpu()
            self._opener = opener

    def end(self, opener: nn.Module) -> None:
        """The pass is over; what is recomputed later says nothing new."""
        if self._opener is opener:
            self._tokens, self._opener = None, None
            self._before.clear()

    @torch.no_grad()
    def add(
        self, name: str, number: int, x_TH: Tensor, update_TH: Tensor, halted_T: Tensor | None
    ) -> None:
        """Count an iteration.

        Raises:
            UnsupportedRuntimeError: It ran over other tokens than the model was given.
        """
        if self._tokens is None:
            return
        if len(x_TH) != len(self._tokens):
            raise UnsupportedRuntimeError(
                f"{name} saw {len(x_TH)} tokens, the model's input has {len(self._tokens)}: "
                f"updates cannot be told apart by text there"
            )
        runs_T = self._tokens.real if halted_T is None else self._tokens.real & ~halted_T.cpu()
        update_TH = update_TH.detach().float()
        size_T = relative_size(update_TH, x_TH.detach())
        self._mean(name, number, _SIZE).add(size_T.cpu(), runs_T, self._tokens)
        before_TH = self._before.get(name) if number else None
        if before_TH is not None:
            cosine_T = torch.cosine_similarity(before_TH, update_TH, dim=-1).cpu()
            both_T = runs_T & (before_TH.any(1) & update_TH.any(1)).cpu()
            self._mean(name, number - 1, _COSINE).add(cosine_T, both_T, self._tokens)
        self._before[name] = update_TH

    def _mean(self, name: str, number: int, what: int) -> _Mean:
        return self._sums.setdefault((name, number, what), _Mean())

    def _estimates(self, name: str, what: int) -> tuple[Estimate, ...]:
        numbers = sorted(key[1] for key in self._sums if (key[0], key[2]) == (name, what))
        return tuple(self._sums[name, number, what].result() for number in numbers)


class _Mean:
    """A mean over tokens, by group of texts."""

    def __init__(self) -> None:
        self._sum = torch.zeros(GROUPS, dtype=torch.float64)
        self._count = torch.zeros(GROUPS, dtype=torch.float64)

    def add(self, values_T: Tensor, counts_T: Tensor, tokens: Tokens) -> None:
        group = group_of(tokens.sample[counts_T])
        add_to_groups(self._sum, group, values_T[counts_T])
        add_to_groups(self._count, group, torch.ones(len(group)))

    def result(self) -> Estimate:
        return ratio(self._sum, self._count)


def _hook_pass(model: nn.Module, meter: UpdateMeter, stack: ExitStack) -> None:
    signature = inspect.signature(model.forward)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments
        meter.begin(module, {**given, **given.get("kwargs", {})})

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        meter.end(module)

    stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(model.register_forward_hook(after, always_call=True).remove)


def _seen(name: str, meter: UpdateMeter) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        hidden_TH, number, _, _, halted_T = args
        meter.add(name, number, hidden_TH, output[0], halted_T)

    return hook
