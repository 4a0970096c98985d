"""Chains with a planted truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from expertmix.core.decision import Decision
from expertmix.core.site import Site, SiteInfo
from expertmix.core.tokens import Tokens
from expertmix.core.trace import Chunk, Memory, Trace, TraceMeta

LAYER = "model.layers.0.mlp"

Route = Callable[[int, list[Tensor], torch.Generator], Tensor]
"""(iteration, the (N, K) experts chosen so far, generator) to (N, K) experts."""


def random_route(tokens: int, experts: int, top_k: int) -> Route:
    """Every set of K experts alike, whatever was chosen before."""

    def route(step: int, before: list[Tensor], generator: torch.Generator) -> Tensor:
        return torch.rand(tokens, experts, generator=generator).topk(top_k).indices

    return route


def chain_trace(
    route: Route,
    *,
    steps: int = 2,
    experts: int = 8,
    texts: int = 12,
    layers: Sequence[str] = (LAYER,),
    padding: int = 2,
) -> Trace:
    """A chunk per text; the first tokens are padding, of which every expert number is 0."""
    infos, chunks = [], []
    for text in range(texts):
        generator = torch.Generator().manual_seed(text)
        decisions: dict[Site, Decision] = {}
        for name in layers:
            chosen: list[Tensor] = []
            for step in range(steps):
                chosen.append(route(step, chosen, generator))
                padded = torch.cat([torch.zeros_like(chosen[-1][:padding]), chosen[-1]])
                decisions[Site(name, step)] = Decision(
                    padded, torch.full(padded.shape, 1 / padded.shape[1]), experts
                )
        tokens = len(padded)
        real = torch.arange(tokens) >= padding
        position = (torch.arange(tokens) - padding).clamp(min=-1)
        sample = torch.full((tokens,), text)
        chunks.append(Chunk(Tokens(sample, position, torch.arange(tokens), real), decisions))
        infos = [SiteInfo(site, experts, padded.shape[1]) for site in decisions]
    return Trace(TraceMeta("f" * 64, "planted", tuple(infos)), Memory(chunks))
