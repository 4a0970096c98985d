"""One open record block: `Recording`, the tap that a binding reports to.

It holds all state of a block, for the length of the block. It knows nothing of models, and hands
each finished pass to a sink without knowing where that keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock, get_ident
from typing import Protocol

import torch
from torch import Tensor

from expertmix.core.decision import Decision
from expertmix.core.intervention import Intervention, Stage
from expertmix.core.removal import Mask
from expertmix.core.site import Site, SiteInfo
from expertmix.core.tokens import Bookkeeper, Pass
from expertmix.core.trace import Chunk
from expertmix.errors import ConfigError, InterventionError, UnsupportedRuntimeError


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
        self._bookkeeper = Bookkeeper()
        self._claim = Lock()
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
        self._thread: int | None = None  # in which a pass is running
        self._waiting: Pass | None = None  # its backward may recompute it
        self._unfinished = 0  # how many such passes there are
        self._recomputed = False

    def begin(self, ids_BS: Tensor, real_BS: Tensor, *, past: int = 0) -> None:
        """A pass starts; in one thread at a time."""
        with self._claim:
            assert not self.open, "a pass begins inside another"
            self._thread = get_ident()
        tokens = self._bookkeeper.read(ids_BS, real_BS, past=past)
        if torch.is_grad_enabled():
            self._unfinished = 1 if self._recomputed else self._unfinished + 1
            self._waiting, self._recomputed = tokens, False
        self._pass = tokens

    def end(self) -> None:
        """Keep what the pass reported."""
        at = self._place(torch.device("cpu"))
        try:
            decisions = {site: self._decision(site) for site in self._infos if site in self._seen}
        finally:
            self.abandon()
        if not decisions:
            raise UnsupportedRuntimeError(
                "the model ran, but no routed layer that is recorded did: its blocks were skipped, "
                "compiled, or replaced by kernels that call no experts module"
            )
        tokens = at.tokens
        self._sink(
            Chunk(tokens, decisions, self._labelled(tokens.sample), self._text(tokens.token_id))
        )

    def abandon(self) -> None:
        """Forget what the pass reported."""
        self._pass, self._thread, self._seen, self._seen_logits = None, None, {}, {}

    @property
    def open(self) -> bool:
        """Whether a pass is running: outside of one, a call is a recomputation and is not kept."""
        if self._thread not in (None, get_ident()):
            raise UnsupportedRuntimeError(
                "another thread is running the model inside this record block: passes cannot be "
                "told apart. Run one at a time, or a copy of the model in each thread."
            )
        return self._pass is not None

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
        at = self._at(site, scores_TE)
        for edit in self._edits[site, stage]:
            scores_TE = edit.edit_scores(stage, scores_TE, self._infos[site], at)
        return scores_TE

    def banned(self, site: Site, device: torch.device) -> Tensor | None:
        """What all masks forbid together."""
        info = self._infos[site]
        masks = [
            edit for edit in self._edits.get((site, Stage.SELECTION), ()) if isinstance(edit, Mask)
        ]
        if not masks:
            return None
        at = self._place(device)
        banned_TE = torch.stack([edit.banned(info, at) for edit in masks]).any(0)
        left = info.num_experts - banned_TE.sum(1)
        if bool((left < info.top_k).any()):
            raise InterventionError(
                f"the masks together leave {int(left.min())} experts at {site}, "
                f"its router must choose {info.top_k}"
            )
        return banned_TE

    def edit_decision(
        self, site: Site, indices_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Apply the interventions after top-k, in order."""
        info = self._infos[site]
        self._refuse_banned(info, indices_TK)
        decision = Decision(indices_TK, weights_TK, info.num_experts)
        for edit in self._edits.get((site, Stage.WEIGHTS), ()):
            decision = edit.edit_decision(decision, info, self._at(site, indices_TK))
        return decision.indices, self._leaf(decision.weights) if self.grad else decision.weights

    def _refuse_banned(self, info: SiteInfo, indices_TK: Tensor) -> None:
        """A router that limits itself to some groups may run out of experts there."""
        banned_TE = self.banned(info.site, indices_TK.device)
        if banned_TE is None:
            return
        chosen_TK = banned_TE.gather(1, indices_TK.to(torch.int64).clamp(0, info.num_experts - 1))
        if bool(chosen_TK.any()):
            raise InterventionError(
                f"Mask leaves too few experts at {info.site}: its router first chooses groups of "
                f"experts, and a chosen group has not enough left. Mask fewer experts of a group, "
                f"or use Ablate."
            )

    def _leaf(self, weights_TK: Tensor) -> Tensor:
        """Weights whose gradient is kept."""
        if torch.is_grad_enabled():
            weights_TK = weights_TK if weights_TK.requires_grad else weights_TK.detach()
            weights_TK.requires_grad_().retain_grad()
        elif self._pass is not None and self._pass is self._waiting:
            raise UnsupportedRuntimeError(
                "grad=True: re-entrant gradient checkpointing runs the layers without gradients. "
                'Use gradient_checkpointing_enable({"use_reentrant": False}).'
            )
        return weights_TK

    def saw(self, site: Site, indices_TK: Tensor, weights_TK: Tensor) -> None:
        """Note what the experts got; a recomputation says nothing new."""
        if self._pass is None:
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
        if self._pass is not None and site not in self._seen_logits:
            self._seen_logits[site] = logits_TE if self.grad else logits_TE.detach()

    def _at(self, site: Site, values_Tx: Tensor) -> Pass:
        """The tokens of these values, on their device."""
        at = self._place(values_Tx.device)
        if len(at) != len(values_Tx):
            raise UnsupportedRuntimeError(
                f"{site} saw {len(values_Tx)} tokens, the model's input has {len(at)}: decisions "
                f"cannot be told apart by token there. Name other sites (sites=…, and in edits)."
            )
        return at

    def _place(self, device: torch.device) -> Pass:
        at = self._recompute() if self._pass is None else self._pass
        return at.to(device)

    def _recompute(self) -> Pass:
        """A block runs again, in the backward pass of a checkpointed model."""
        if self._waiting is None or not torch.is_grad_enabled():
            raise UnsupportedRuntimeError(
                "a router ran outside of the model's own forward: call the model itself inside the "
                "record block, not one of its layers"
            )
        self._recomputed = True
        if self._unfinished > 1:
            raise UnsupportedRuntimeError(
                f"{self._unfinished} passes wait for their backward, and a recomputed block does "
                f"not say to which it belongs. With gradient checkpointing, call backward after "
                f"each forward while interventions are active."
            )
        return self._waiting

    def _decision(self, site: Site) -> Decision:
        indices_TK, weights_TK = self._seen[site]
        info = self._infos[site]
        self._at(site, indices_TK)
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
        known = tuple(self._decoder.convert_ids_to_tokens(ids_N.clamp(min=0).tolist()))
        return tuple(
            text if id_ >= 0 else "" for text, id_ in zip(known, ids_N.tolist(), strict=True)
        )


def _plan(
    infos: Sequence[SiteInfo], interventions: Sequence[Intervention]
) -> dict[tuple[Site, Stage], list[Intervention]]:
    plan: dict[tuple[Site, Stage], list[Intervention]] = {}
    for edit in single_edits(interventions):
        for site in edit.targets(infos):
            for stage in edit.stages:
                plan.setdefault((site, stage), []).append(edit)
    return plan


def single_edits(interventions: Sequence[Intervention]) -> Iterator[Intervention]:
    """The edits that interventions are made of, in order.

    Raises:
        ConfigError: Something that is no intervention.
    """
    for outer in interventions:
        if not isinstance(outer, Intervention):
            raise ConfigError(
                f"record(model, *interventions) got a {type(outer).__name__}: pass interventions "
                f"one by one, or as InOrder(…)"
            )
        yield from outer.parts()
