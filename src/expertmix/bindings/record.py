"""`record` and `sites` for any model: finds the binding, then leaves the work to the core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from expertmix.bindings.both import Both
from expertmix.bindings.transformers import TransformersMoE
from expertmix.core.intervention import Intervention
from expertmix.core.protocols import Routed
from expertmix.core.record import record as record_routed
from expertmix.core.recording import Decoder
from expertmix.core.site import SiteInfo
from expertmix.core.trace import Trace
from expertmix.errors import NoSitesError, UnsupportedModelError
from expertmix.experts.composed import Composed


def bind(model: nn.Module | Routed) -> Routed:
    """See a model as sites.

    Raises:
        NoSitesError: A dense model.
        UnsupportedModelError: A family that routes in a way that cannot be recorded faithfully.
    """
    if not isinstance(model, nn.Module):
        return model
    composed = Composed.of(model)
    if composed is None:
        return TransformersMoE(model)
    try:
        return Both(composed, TransformersMoE(model))
    except (NoSitesError, UnsupportedModelError):
        return composed


def sites(model: nn.Module | Routed) -> tuple[SiteInfo, ...]:
    """The sites of a model, in the order in which they run."""
    return tuple(bind(model).sites)


@contextmanager
def record(
    model: nn.Module | Routed,
    *interventions: Intervention,
    sites: str = "*",
    logits: bool = False,
    grad: bool = False,
    to: str | Path | None = None,
    weights: str = "float32",
    token_ids: bool = True,
    overwrite: bool = False,
    labels: Sequence[str] | None = None,
    tokenizer: Decoder | None = None,
) -> Iterator[Trace]:
    """Record and edit the routing decisions of everything that runs inside the block.

    Works in `forward` and `generate`, with caches, padding, batches, gradients and gradient
    checkpointing, nested and repeated. Recording alone changes no bit of the output.

    Args:
        model: Any MoE model of transformers, a wrapper around one, or a model with adapters on it
            (`compose`).
        interventions: Edits, applied stage by stage and, within a stage, in this order.
        sites: Pattern of the sites to record; interventions have patterns of their own.
        logits: Keep the gate's logits too.
        grad: Keep weights (and logits) in the autograd graph, for one pass per block. Weights that
            need no gradient become leaves that do.
        to: Stream to this Parquet file instead of memory, which then stays flat. The file has its
            name only when the block has ended well.
        weights: Precision of weights in that file, `float32` or `float16`.
        token_ids: Keep token ids in that file; whoever has the tokenizer reads the text from them.
        overwrite: Replace a file that is there.
        labels: A name per sample, such as its domain, in the order of the samples.
        tokenizer: Keep token strings. Without it no text is kept.

    Yields:
        The trace, which fills as the model runs.

    Raises:
        NoSitesError: A dense model.
        UnsupportedModelError: A family that cannot be recorded faithfully, or an encoder with a
            decoder.
        UnsupportedRuntimeError: A compiled model, or a captured CUDA graph.
        AddressError: A pattern or an expert number points at nothing.
        FingerprintError: A replayed trace belongs to another model.

    Example:
        >>> with em.record(model, em.Ablate("*.layers.7.mlp", experts=[3])) as trace:
        ...     model(**inputs)
        >>> trace["model.layers.7.mlp"].weights  # (tokens, top_k)
    """
    with record_routed(
        bind(model),
        *interventions,
        sites=sites,
        logits=logits,
        grad=grad,
        to=to,
        weights=weights,
        token_ids=token_ids,
        overwrite=overwrite,
        labels=labels,
        tokenizer=tokenizer,
    ) as trace:
        yield trace
