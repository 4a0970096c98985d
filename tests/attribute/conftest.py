"""Small synthetic traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from expertmix.core.decision import Decision
from expertmix.core.site import Site, SiteInfo
from expertmix.core.tokens import Tokens
from expertmix.core.trace import Chunk, Memory, Trace, TraceMeta

LABELS = ("code", "verse", "law")


def random_chunk(
    infos: Sequence[SiteInfo],
    tokens: int,
    seed: int = 0,
    *,
    logits: bool = True,
    ragged: bool = True,
    samples: int = 4,
) -> Chunk:
    """Tokens of a few samples, some of them padding; distinct experts, some slots empty."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randint(0, samples, (tokens,), generator=generator)
    real = torch.rand(tokens, generator=generator) > 0.2
    position = torch.arange(tokens).masked_fill(~real, -1)
    decisions = {
        info.site: _random_decision(info, tokens, generator, logits=logits, ragged=ragged)
        for info in infos
    }
    labels = {number: LABELS[number] for number in range(min(samples, len(LABELS)))}
    ids = torch.randint(0, 99, (tokens,), generator=generator)
    return Chunk(Tokens(sample, position, ids, real), decisions, labels)


def _random_decision(
    info: SiteInfo, tokens: int, generator: torch.Generator, *, logits: bool, ragged: bool
) -> Decision:
    scores_NE = torch.randn(tokens, info.num_experts, generator=generator)
    top = scores_NE.softmax(-1).topk(info.top_k, dim=-1)
    weights, indices = top.values, top.indices
    if ragged:
        empty = torch.rand(indices.shape, generator=generator) < 0.1
        ablated = torch.rand(indices.shape, generator=generator) < 0.1
        indices = indices.masked_fill(empty, -1)
        weights = weights.masked_fill(empty | ablated, 0)
    return Decision(indices, weights, info.num_experts, scores_NE if logits else None)


def make_infos(*shapes: tuple[int, int]) -> tuple[SiteInfo, ...]:
    """Sites with (experts, top_k)."""
    return tuple(
        SiteInfo(Site(f"model.layers.{number}.mlp"), experts, top_k)
        for number, (experts, top_k) in enumerate(shapes)
    )


def make_trace(infos: Sequence[SiteInfo], chunks: list[Chunk]) -> Trace:
    """In memory."""
    return Trace(TraceMeta("f" * 64, "tiny", tuple(infos)), Memory(chunks))


@pytest.fixture
def traced() -> Callable[..., Trace]:
    """A trace with sites of the given (experts, top_k) and chunks of the given lengths."""

    def build(shapes: Sequence[tuple[int, int]], lengths: Sequence[int] = (17, 5)) -> Trace:
        infos = make_infos(*shapes)
        parts = [random_chunk(infos, length, seed) for seed, length in enumerate(lengths)]
        return make_trace(infos, parts)

    return build
