"""A synthetic recording of adapters at several modules of each layer."""

from __future__ import annotations

import torch

from expertmix.core.decision import Decision
from expertmix.core.site import Site, SiteInfo
from expertmix.core.tokens import Tokens
from expertmix.core.trace import Chunk, Memory, Trace, TraceMeta

NAMES = ("maths", "python", "<b>poetry</b>")
KINDS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")


def adapter_infos(
    layers: int = 4, names: tuple[str, ...] = NAMES, kinds: tuple[str, ...] = KINDS
) -> tuple[SiteInfo, ...]:
    return tuple(
        SiteInfo(Site(f"model.layers.{layer}.{kind}"), len(names), 2, names)
        for layer in range(layers)
        for kind in kinds
    )


def adapter_chunk(infos: tuple[SiteInfo, ...], sample: int, label: str | None, size: int) -> Chunk:
    """Mostly the adapter of the sample's number; weights that do not sum to one."""
    generator = torch.Generator().manual_seed(sample)
    tokens = Tokens(
        torch.full((size,), sample), torch.arange(size), torch.arange(size), torch.ones(size).bool()
    )
    decisions = {}
    for info in infos:
        scores = torch.rand(size, info.num_experts, generator=generator)
        scores[:, sample % info.num_experts] += 0.6
        top = scores.topk(info.top_k, dim=1)
        decisions[info.site] = Decision(top.indices, top.values / 3, info.num_experts)
    text = tuple(f"Ġ{label}{number}" for number in range(size))
    return Chunk(tokens, decisions, {} if label is None else {sample: label}, text)


def adapter_trace(
    infos: tuple[SiteInfo, ...] | None = None, *, labels: tuple[str | None, ...] = NAMES
) -> Trace:
    """A sample for each label."""
    infos = adapter_infos() if infos is None else infos
    chunks = [adapter_chunk(infos, n, label, 12) for n, label in enumerate(labels)]
    settings = {"dtype": "float32", "router": "SpectR()", "combination": "outputs"}
    meta = TraceMeta("0" * 64, "tiny + 3 adapters", infos, settings=settings)
    return Trace(meta, Memory(chunks))
