"""How routing goes while a model trains: `RoutingWatch`, hooks that count, and what they found.

It changes nothing, keeps a few numbers per router call, and rests unless it is told to look, so
that training is not slowed down. What it adds up stays on the device until it is taken.

Legend: T tokens, H hidden size, E experts, K of them per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertmix.bindings.discovery import Block, find_layers
from expertmix.core.site import Site
from expertmix.errors import NoSitesError
from expertmix.experts.chain import Iteration, relative_size
from expertmix.experts.chain_router import ChainRouter

_RETAINED, _ENTROPY, _UPDATE, _TOKENS, _PAIRS, _ROUTED, _UPDATED = range(7)


@dataclass(frozen=True, slots=True)
class SiteRouting:
    """What a router did, over the tokens that were looked at.

    Attributes:
        site: Layer and iteration: `model.layers.0.mlp#1`.
        load: Share of all calls that each expert got; E numbers with a sum of 1.
        entropy: Mean entropy of a token's probabilities, as a share of ln E.
        retention: Share of the K experts that the iteration before had chosen, too; None in the
            first. By chance it is K / E.
        update_norm: Mean size of an iteration's update, relative to what it is added to; None
            where there are no iterations.
    """

    site: str
    load: tuple[float, ...]
    entropy: float | None
    retention: float | None
    update_norm: float | None

    @property
    def load_max_over_mean(self) -> float:
        """1 where all experts are called equally often."""
        return max(self.load) * len(self.load)

    @property
    def dead(self) -> tuple[int, ...]:
        """Experts that nobody called."""
        return tuple(number for number, share in enumerate(self.load) if not share)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "site": self.site,
            "load": [round(share, 5) for share in self.load],
            "load_max_over_mean": self.load_max_over_mean,
            "dead": list(self.dead),
            "entropy": self.entropy,
            "retention": self.retention,
            "update_norm": self.update_norm,
        }


class _Tally:
    """Sums over the tokens that one router call at one iteration saw."""

    def __init__(self, experts: int, device: torch.device) -> None:
        self.calls_E = torch.zeros(experts, dtype=torch.float64, device=device)
        self.sums = torch.zeros(7, dtype=torch.float64, device=device)


class RoutingWatch:
    """Looks at a model's routers while it is `looking`; `take` tells what was seen since.

    Args:
        model: A causal LM; a dense one has nothing to look at.
    """

    def __init__(self, model: nn.Module) -> None:
        self._blocks = blocks_of(model)
        self._looking = False
        self._tallies: dict[tuple[int, int], _Tally] = {}
        self._turn: dict[int, int] = {}
        self._before: dict[int, Tensor] = {}
        self._entropy_T: dict[int, Tensor] = {}

    @property
    def routed(self) -> bool:
        """Whether there is something to look at."""
        return bool(self._blocks)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the model for the length of the block."""
        with ExitStack() as stack:
            for number, block in enumerate(self._blocks):
                for handle in self._hooks(number, block):
                    stack.callback(handle.remove)
            yield

    @contextmanager
    def looking(self, wanted: bool) -> Iterator[None]:
        """Look at the passes of this block; a recomputation in the backward pass is outside."""
        self._looking = wanted
        try:
            yield
        finally:
            self._looking = False
            self._before.clear()
            self._entropy_T.clear()

    @torch.no_grad()
    def take(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> list[SiteRouting]:
        """What was seen, and begin anew.

        Args:
            reduce: Adds a tensor up over all processes.
        """
        tallies, self._tallies = self._tallies, {}
        found = []
        for key in sorted(tallies):
            tally = tallies[key]
            both = reduce(torch.cat([tally.sums.float(), tally.calls_E.float()])).tolist()
            found.append(_site(self._blocks[key[0]], key[1], both[:7], both[7:]))
        return found

    def _hooks(self, number: int, block: Block) -> Iterator[Any]:
        yield block.module.register_forward_pre_hook(lambda module, args: self._begin(number))
        for router in routers_of(block):
            yield router.register_forward_hook(
                lambda module, args, out: self._routed(number, module, out)
            )
        yield block.experts.register_forward_pre_hook(
            lambda module, args, kwargs: self._called(number, args, kwargs), with_kwargs=True
        )
        for iteration in block.module.modules():
            if isinstance(iteration, Iteration):
                yield iteration.register_forward_hook(
                    lambda module, args, out: self._updated(number, args, out)
                )

    def _begin(self, number: int) -> None:
        self._turn[number] = 0
        self._before.pop(number, None)
        self._entropy_T.pop(number, None)

    @torch.no_grad()
    def _routed(self, number: int, router: nn.Module, output: Any) -> None:
        if not self._looking:
            return
        logits_TE = (output[0] if isinstance(output, tuple) else output).detach().float()
        logits_TE = logits_TE.reshape(-1, logits_TE.shape[-1])
        if isinstance(router, ChainRouter) and router.config.scores == "sigmoid":
            logits_TE = nn.functional.logsigmoid(logits_TE)
        logs_TE = logits_TE.log_softmax(-1)
        self._entropy_T[number] = -(logs_TE.exp() * logs_TE).sum(-1)

    @torch.no_grad()
    def _called(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._looking:
            return
        index_TK = [*args, *kwargs.values()][1]
        index_TK = index_TK.detach().reshape(-1, index_TK.shape[-1])
        tally = self._tally(number, self._turn[number], index_TK.device)
        self._turn[number] += 1
        flat = index_TK.reshape(-1)
        tally.calls_E.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float64))
        tally.sums[_TOKENS] += len(index_TK)
        if (before_TK := self._before.get(number)) is not None:
            tally.sums[_RETAINED] += (index_TK[:, :, None] == before_TK[:, None, :]).sum()
            tally.sums[_PAIRS] += index_TK.numel()
        if (entropy_T := self._entropy_T.pop(number, None)) is not None:
            tally.sums[_ENTROPY] += entropy_T.sum()
            tally.sums[_ROUTED] += len(entropy_T)
        self._before[number] = index_TK

    @torch.no_grad()
    def _updated(self, number: int, args: tuple[Any, ...], output: Any) -> None:
        if not self._looking:
            return
        size_T = relative_size(output[0].detach(), args[0].detach())
        tally = self._tally(number, args[1], size_T.device)
        tally.sums[_UPDATE] += size_T.sum()
        tally.sums[_UPDATED] += len(size_T)

    def _tally(self, number: int, turn: int, device: torch.device) -> _Tally:
        if (number, turn) not in self._tallies:
            experts = experts_of(self._blocks[number])
            self._tallies[number, turn] = _Tally(experts, device)
        return self._tallies[number, turn]


def blocks_of(model: nn.Module) -> tuple[Block, ...]:
    """All routed blocks; none of a dense model."""
    try:
        return find_layers(model)
    except NoSitesError:
        return ()


def routers_of(block: Block) -> list[nn.Module]:
    """The routers of a block: of a chain, one per iteration that has an own one."""
    if block.router is not None:
        return [block.router]
    return [one for one in block.module.modules() if isinstance(one, ChainRouter)]


def experts_of(block: Block) -> int:
    """E, also where a process has only some of the experts: routers know all of them."""
    router = next(iter(routers_of(block)), None)
    if isinstance(router, ChainRouter):
        return router.num_experts
    return max(block.width, block.info.num_experts)


def scalars(sites: list[SiteRouting]) -> dict[str, float]:
    """The figures as trackers take them: one number per name."""
    found: dict[str, float] = {}
    for one in sites:
        found[f"load_max_over_mean/{one.site}"] = one.load_max_over_mean
        found[f"dead_experts/{one.site}"] = float(len(one.dead))
        for name in ("entropy", "retention", "update_norm"):
            value = getattr(one, name)
            if value is not None:
                found[f"{name}/{one.site}"] = value
    return found


def _site(block: Block, turn: int, sums: list[float], calls_E: list[float]) -> SiteRouting:
    name = block.info.site.name.removeprefix("base_model.model.")
    total = sum(calls_E) or 1.0
    widest = torch.tensor(float(len(calls_E))).log().item() or 1.0
    routed, pairs, updated = sums[_ROUTED], sums[_PAIRS], sums[_UPDATED]
    return SiteRouting(
        str(Site(name, turn)),
        tuple(calls / total for calls in calls_E),
        sums[_ENTROPY] / routed / widest if routed else None,
        sums[_RETAINED] / pairs if pairs else None,
        sums[_UPDATE] / updated if updated else None,
    )
