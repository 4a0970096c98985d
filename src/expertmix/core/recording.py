"""The act of recording: `record` opens a block in which decisions are edited and kept.

It is given a `Routed` and knows nothing of models. All state lives in one `Recording` object, which
exists for the length of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from expertmix.core.decision import Decision
from expertmix.core.intervention import Intervention, Mask, Stage
from expertmix.core.protocols import Routed
from expertmix.core.replay import Replay
from expertmix.core.site import Site, SiteInfo, match
from expertmix.core.tokens import Bookkeeper, Pass
from expertmix.core.trace import Chunk, Memory, Trace, TraceMeta
from expertmix.errors import FingerprintError, InterventionError, UnsupportedRuntimeError


class Decoder(Protocol):
    """The part of a tokenizer that turns ids into token strings."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Token strings."""


class Recording:
    """One open record block; the tap that a binding reports to."""

    def __init__(
        self,
        infos: Sequence[SiteInfo],
        interventions: Sequence[Intervention],
        *,
        recorded: frozenset[Site],
        logits: bool,
        grad: bool,
        labels: Sequence[str] | None,
        decoder: Decoder | None,
        sink: Callable[[Chunk], None],
    ) -> None:
        self.bookkeeper = Bookkeeper()
        self._sink = sink
        self._infos = {info.site: info for info in infos}
        self._edits = _plan(infos, interventions)
        self._recorded = recorded
        self._logits = logits
        self.grad = grad
        self._labels = labels
        self._decoder = decoder
        self._seen: dict[Site, tuple[Tensor, Tensor]] = {}
        self._seen_logits: dict[Site, Tensor] = {}
        self._pass: Pass | None = None
        self._open = False
        self._unfinished = 0  # passes whose backward may still recompute them
        self._recomputed = False

    def begin(self, tokens: Pass) -> None:
        """A pass starts."""
        self._unfinished = int(torch.is_grad_enabled()) + (
            0 if self._recomputed else self._unfinished
        )
        self._recomputed = False
        self._pass, self._open = tokens, True
        self._seen, self._seen_logits = {}, {}

    def end(self) -> None:
        """Keep what the pass reported."""
        tokens = self._current.tokens
        decisions = {site: self._decision(site) for site in self._infos if site in self._seen}
        self._open, self._seen, self._seen_logits = False, {}, {}
        if not decisions:
            return
        cpu = tokens.cpu()
        self._sink(Chunk(cpu, decisions, self._labelled(cpu.sample), self._text(cpu.token_id)))

    def abandon(self) -> None:
        """Forget what the pass reported."""
        self._open, self._seen, self._seen_logits = False, {}, {}

    @property
    def open(self) -> bool:
        """Whether a pass is running: outside of one, a call is a recomputation and is not kept."""
        return self._open

    def wants(self, site: Site) -> bool:
        """Whether this site is recorded."""
        return site in self._recorded

    def wants_logits(self) -> bool:
        """Whether logits are recorded."""
        return self._logits

    def edits(self, site: Site, stage: Stage) -> bool:
        """Whether any intervention acts there."""
        return (site, stage) in self._edits

    def edit_scores(self, site: Site, stage: Stage, scores_TE: Tensor) -> Tensor:
        """Apply the interventions of a stage, in order."""
        for edit in self._edits[site, stage]:
            scores_TE = edit.edit_scores(
                stage, scores_TE, self._infos[site], self._at(len(scores_TE))
            )
        return scores_TE

    def banned(self, site: Site) -> Tensor | None:
        """What all masks forbid together."""
        info = self._infos[site]
        masks = [
            edit for edit in self._edits.get((site, Stage.SELECTION), ()) if isinstance(edit, Mask)
        ]
        if not masks:
            return None
        at = self._current
        banned_TE = masks[0].banned(info, at)
        for edit in masks[1:]:
            banned_TE = banned_TE | edit.banned(info, at)
        left = info.num_experts - int(banned_TE.sum(1).max())
        if left < info.top_k:
            raise InterventionError(
                f"the masks together leave {left} experts at {site}, "
                f"its router must choose {info.top_k}"
            )
        return banned_TE

    def edit_decision(
        self, site: Site, indices_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Apply the interventions after top-k, in order."""
        info = self._infos[site]
        decision = Decision(indices_TK, weights_TK, info.num_experts)
        for edit in self._edits.get((site, Stage.WEIGHTS), ()):
            decision = edit.edit_decision(decision, info, self._at(len(decision)))
        weights_TK = decision.weights
        if self.grad and torch.is_grad_enabled():
            weights_TK = weights_TK if weights_TK.requires_grad else weights_TK.detach()
            weights_TK.requires_grad_().retain_grad()
        return decision.indices, weights_TK

    def saw(self, site: Site, indices_TK: Tensor, weights_TK: Tensor) -> None:
        """Note what the experts got; a recomputation says nothing new."""
        if not self._open:
            return
        if site in self._seen:
            raise UnsupportedRuntimeError(
                f"{site} ran twice in one pass: this model loops over its layers, and one site "
                f"would hold two decisions for a token"
            )
        weights_TK = weights_TK if self.grad else weights_TK.detach()
        self._seen[site] = (indices_TK.detach(), weights_TK)

    def saw_logits(self, site: Site, logits_TE: Tensor) -> None:
        """Note what the gate gave."""
        if self._open and site not in self._seen_logits:
            self._seen_logits[site] = logits_TE if self.grad else logits_TE.detach()

    @property
    def _current(self) -> Pass:
        if self._pass is None:
            raise UnsupportedRuntimeError(
                "a router ran outside of the model's own forward: call the model itself inside the "
                "record block, not one of its layers"
            )
        return self._pass

    def _at(self, tokens: int) -> Pass:
        at = self._current
        if not self._open:
            self._recompute()
        if len(at) != tokens:
            raise UnsupportedRuntimeError(
                f"the router saw {tokens} tokens, the model's input has {len(at)}: decisions "
                f"cannot be told apart by token here"
            )
        return at

    def _recompute(self) -> None:
        """A block runs again, in the backward pass of a checkpointed model."""
        self._recomputed = True
        if self._unfinished > 1:
            raise UnsupportedRuntimeError(
                f"{self._unfinished} passes wait for their backward, and a recomputed block does "
                f"not say to which it belongs. With gradient checkpointing, call backward after "
                f"each forward while interventions are active."
            )

    def _decision(self, site: Site) -> Decision:
        indices_TK, weights_TK = self._seen[site]
        info = self._infos[site]
        self._at(len(indices_TK))
        logits = self._seen_logits.get(site)
        if self.grad:
            return Decision(indices_TK, weights_TK, info.num_experts, logits)
        return Decision(
            indices_TK.to("cpu", torch.int64),
            weights_TK.cpu(),
            info.num_experts,
            None if logits is None else logits.cpu(),
        )

    def _labelled(self, sample_N: Tensor) -> Mapping[int, str]:
        if self._labels is None or not len(sample_N):
            return {}
        known = range(int(sample_N.min()), min(int(sample_N.max()) + 1, len(self._labels)))
        return {number: self._labels[number] for number in known}

    def _text(self, ids_N: Tensor) -> tuple[str, ...] | None:
        if self._decoder is None:
            return None
        return tuple(self._decoder.convert_ids_to_tokens(ids_N.clamp(min=0).tolist()))


@contextmanager
def record(
    routed: Routed,
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

    Args:
        routed: What routes; `expertmix.record` finds it in a model.
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
        AddressError: A pattern or an expert number points at nothing.
        FingerprintError: A replayed trace belongs to another model.
    """
    infos = tuple(routed.sites)
    recorded = frozenset(match(sites, [info.site for info in infos]))
    fingerprint = routed.fingerprint()
    _check_replays(interventions, fingerprint)
    meta = TraceMeta(
        fingerprint=fingerprint,
        model=routed.name,
        sites=tuple(info for info in infos if info.site in recorded),
        interventions=tuple(_described(edit) for edit in interventions),
        settings=routed.settings,
        versions=_versions(),
    )
    open_store = _memory(meta)
    if to is not None:
        open_store = _file(meta, to, weights=weights, token_ids=token_ids, overwrite=overwrite)
    with open_store as (trace, sink):
        recording = Recording(
            infos, interventions, recorded=recorded, logits=logits, grad=grad, labels=labels,
            decoder=tokenizer, sink=sink,
        )  # fmt: skip
        with routed.attach(recording):
            yield trace


@contextmanager
def _memory(meta: TraceMeta) -> Iterator[tuple[Trace, Callable[[Chunk], None]]]:
    memory = Memory()
    yield Trace(meta, memory), memory.held.append


@contextmanager
def _file(
    meta: TraceMeta, path: str | Path, *, weights: str, token_ids: bool, overwrite: bool
) -> Iterator[tuple[Trace, Callable[[Chunk], None]]]:
    from expertmix.core.parquet import ParquetStore, TraceWriter

    writer = TraceWriter(path, meta, weights=weights, token_ids=token_ids, overwrite=overwrite)
    with writer:
        yield Trace(meta, ParquetStore(Path(path), meta)), writer.write


def _plan(
    infos: Sequence[SiteInfo], interventions: Sequence[Intervention]
) -> dict[tuple[Site, Stage], list[Intervention]]:
    plan: dict[tuple[Site, Stage], list[Intervention]] = {}
    for edit in (part for outer in interventions for part in outer.parts()):
        for site in edit.targets(infos):
            for stage in edit.stages:
                plan.setdefault((site, stage), []).append(edit)
    return plan


def _check_replays(interventions: Sequence[Intervention], fingerprint: str) -> None:
    for edit in (part for outer in interventions for part in outer.parts()):
        if not isinstance(edit, Replay) or edit.any_model:
            continue
        if edit.trace.meta.fingerprint != fingerprint:
            raise FingerprintError(
                f"the trace was recorded on {edit.trace.meta.model!r} "
                f"({edit.trace.meta.fingerprint[:12]}), this model is {fingerprint[:12]}: other "
                f"weights or another structure. Pass any_model=True to replay it all the same."
            )


def _described(edit: Intervention) -> dict[str, object]:
    try:
        return edit.to_dict()
    except InterventionError:
        return {"kind": edit.kind, "note": "not serializable: its trace was not saved"}


def _versions() -> dict[str, str]:
    found = {}
    for package in ("expertmix", "torch", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
