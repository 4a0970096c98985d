"""Balance without a loss: a bias on what routers select from, moved after each step: `BiasBalance`.

b_i += rate · sign(mean load - load of expert i) (arXiv 2408.15664, eq. 3 and algorithm 1), per
router: in a chain with a router per iteration, per iteration and expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from expertmix.experts.chain import Chain, Iteration
from expertmix.experts.chain_router import ChainRouter


class BiasBalance:
    """Counts calls while it is `counting`, and moves the biases on `update`.

    Args:
        model: Those of its chains whose routers have a bias are balanced.
        rate: How far a bias moves in a step.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        chains = [one for one in model.modules() if isinstance(one, Chain)]
        self._iterations = [
            iteration
            for chain in chains
            if chain.config.router_bias
            for iteration in chain.iterations
        ]
        self._rate = rate
        self._counting = False
        self._calls: dict[ChainRouter, Tensor] = {}

    @property
    def needed(self) -> bool:
        """Whether there is a bias to move."""
        return bool(self._iterations) and self._rate > 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the chains for the length of the block."""
        with ExitStack() as stack:
            for iteration in self._iterations if self.needed else ():
                stack.callback(iteration.register_forward_hook(self._count).remove)
            yield

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the calls of the passes in this block."""
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    @torch.no_grad()
    def update(self, reduce: Callable[[Tensor], Tensor] = lambda calls: calls) -> None:
        """Move each bias by one step, and forget the calls.

        Args:
            reduce: Adds a tensor up over all processes.
        """
        for router, calls_E in self._calls.items():
            load_E = reduce(calls_E)
            bias_E: Tensor = router.e_score_correction_bias
            bias_E += self._rate * (load_E.mean() - load_E).sign()
        self._calls.clear()

    @torch.no_grad()
    def _count(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._counting:
            return
        assert isinstance(module, Iteration)
        number, chain = args[1], args[2]
        router = chain.gate_of(number)
        flat = output[1].experts.reshape(-1)
        calls_E = self._calls.setdefault(
            router, torch.zeros(router.num_experts, dtype=torch.float32, device=flat.device)
        )
        calls_E.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))
