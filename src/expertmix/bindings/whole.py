"""Pathways by full passes: what works for every model of transformers that has sites.

Each option of a question is a row of its own: plain tokens, padded on the right. So nothing is
asked of the model but its forward; state spaces, indexed attention and routed adapters all fit.
Nothing is kept between passes either: a pathway costs a pass over everything.

Legend: B questions, R rows, S columns, O options, W longest option, D decision tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertmix.bindings.both import Both
from expertmix.bindings.head import Head, Predictions
from expertmix.bindings.session import Session
from expertmix.bindings.slots import Slots
from expertmix.bindings.transformers import TransformersMoE
from expertmix.bindings.truncated import Stack, entering
from expertmix.core.pathway import Pathway, Question, Reading
from expertmix.core.protocols import Routed
from expertmix.core.site import SiteInfo
from expertmix.errors import UnsupportedModelError
from expertmix.experts.composed import Composed


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """Questions as plain rows, one per option.

    Attributes:
        ids: (R, S) token ids, 0 where padded.
        real: (R, S) int64, 1 where there is a token.
        first: Per question, the row of its first option.
        slots: The decision tokens.
        predictions: What the rows predict.
        counting: (N,) flat numbers of the tokens that are no padding.
    """

    ids: Tensor
    real: Tensor
    first: tuple[int, ...]
    slots: Slots
    predictions: Predictions
    counting: Tensor

    @classmethod
    def of(
        cls, questions: Sequence[Question], decisions: int, scored: bool, device: torch.device
    ) -> Rows:
        """Lay questions out."""
        owners = [
            (number, place)
            for number, one in enumerate(questions)
            for place in range(len(one.options))
        ]
        texts = [questions[b].prompt + questions[b].options[o][:-1] for b, o in owners]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
        real = torch.zeros_like(ids)
        most = max(len(one.options) for one in questions)
        longest = max(len(option) for one in questions for option in one.options)
        source, target = torch.zeros(2, len(questions), most, longest, dtype=torch.int64)
        predicted = torch.zeros(len(questions), most, longest, dtype=torch.bool)
        decided: list[tuple[int, int, int]] = []
        for row, ((b, o), text) in enumerate(zip(owners, texts, strict=True)):
            option, last = (
                questions[b].options[o],
                row * ids.shape[1] + len(questions[b].prompt) - 1,
            )
            real[row, : len(text)] = 1
            source[b, o, : len(option)] = last + torch.arange(len(option))
            target[b, o, : len(option)] = torch.tensor(option)
            predicted[b, o, : len(option)] = True
            back = range(min(decisions, len(questions[b].prompt)))
            decided += [(last - one, b, one) for one in back]
            if scored:
                decided += [(last + one, b, 0) for one in range(1, len(option))]
        flat, question, back_n = torch.tensor(decided, device=device).unbind(1)
        first = tuple(owners.index((number, 0)) for number in range(len(questions)))
        return cls(
            ids.to(device),
            real.to(device),
            first,
            Slots(flat, question, back_n, len(questions), decisions),
            Predictions.of(source.to(device), target.to(device), predicted.to(device)),
            real.flatten().nonzero().flatten().to(device),
        )


class Whole:
    """A model of transformers whose sites are read again by full passes; works inside `running`.

    Args:
        routed: The model as sites: a MoE, a composed model, or both.
        sites: The critical ones.
        decisions: D, how many tokens of a prompt's end are decision tokens.
        scored: Whether the options' tokens are decision tokens too.
        shift: Whether pathways of mode `add` will come.
        notice: What a user should be told.

    Raises:
        UnsupportedModelError: No model of transformers, or one without an output over words.
        ConfigError: See `Session`.
    """

    exact = False

    def __init__(
        self,
        routed: Routed,
        sites: Sequence[SiteInfo],
        *,
        decisions: int = 1,
        scored: bool = False,
        shift: bool = False,
        notice: str | None = None,
    ) -> None:
        self.routed, self.sites = routed_of(routed), tuple(sites)
        self.decisions, self.scored, self.shift = decisions, scored, shift
        self.notice = notice
        self.lm: Any = model_of(self.routed)
        self._session = Session(self.routed, self.lm, _moe_of(self.routed), self.sites, shift=shift)
        self.tap = self._session.tap
        self._entry = _entry(self.lm, self.sites[0].site.name)
        self._head = Head(self.lm)
        self._device = next(self.lm.parameters()).device

    def fingerprint(self) -> str:
        """Of the model; read once."""
        return self._session.fingerprint

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hooks are in the model while this is open, and it is at rest.

        Raises:
            UnsupportedRuntimeError: The model is open already, or is being recorded.
        """
        with self._session.running():
            yield

    def read(self, questions: Sequence[Question]) -> list[Reading]:
        """One plain pass over all of them."""
        if not questions:
            return []
        rows = self.batch(questions, [{}] * len(questions))
        entered = list[Tensor]()
        self._session.rest()
        hook = entering(self._entry, entered)
        try:
            with torch.no_grad():
                logprobs = self._logprobs(rows).cpu()
            return [
                self._reading(rows, number, one, logprobs[number], entered[0])
                for number, one in enumerate(questions)
            ]
        finally:
            hook.remove()
            self._session.rest()

    def _reading(
        self, rows: Rows, number: int, one: Question, logprobs: Tensor, entered: Tensor
    ) -> Reading:
        row, length = rows.first[number], len(one.prompt)
        prompt = entered.reshape(*rows.ids.shape, -1)[row, :length].cpu()
        last = row * rows.ids.shape[1] + length - 1
        return Reading(
            logprobs[: len(one.options), : max(map(len, one.options))].clone(),
            prompt[-1].clone(),
            prompt.float().mean(0),
            *self.tap.decisions(last, min(length, self.decisions), self.decisions),
            {},
        )

    def batch(
        self,
        questions: Sequence[Question],
        states: Sequence[Mapping[str, Tensor]],
        *,
        only: Sequence[int] | None = None,
    ) -> Rows:
        """Rows of the questions; of one option each where `only` says which."""
        if only is not None:
            questions = [
                Question(one.prompt, (one.options[number],))
                for one, number in zip(questions, only, strict=True)
            ]
        return Rows.of(questions, self.decisions, self.scored, self._device)

    def score(self, batch: Any, pathway: Pathway | None) -> Tensor:
        """Log-probabilities of the options' tokens under a pathway; of a batch made by `batch`."""
        assert isinstance(batch, Rows), "made by `batch`"
        self._session.rest()
        if pathway is not None:
            self.tap.placed = batch.slots.lay(pathway, self.sites, self.shift)
        try:
            return self._logprobs(batch)
        finally:
            self._session.rest()

    def _logprobs(self, rows: Rows) -> Tensor:
        self._session.sparing.counting = rows.counting
        with self._head.packing(rows.predictions):
            output = self.lm(input_ids=rows.ids, attention_mask=rows.real, use_cache=False)
            return rows.predictions.logprobs(self._head.logits(output, rows.predictions))


def routed_of(routed: Routed) -> TransformersMoE | Composed | Both:
    """The same, if it is a model of transformers.

    Raises:
        UnsupportedModelError: It is none.
    """
    if not isinstance(routed, TransformersMoE | Composed | Both):
        raise UnsupportedModelError(
            f"{routed.name} is no model of transformers: pathways need log-probabilities and "
            f"gradients of one"
        )
    return routed


def model_of(routed: TransformersMoE | Composed | Both) -> nn.Module:
    """The model of transformers that has these sites.

    Raises:
        UnsupportedModelError: It predicts no words.
    """
    if isinstance(routed, Both):
        return model_of(routed.composed)
    lm: Any = routed.model
    if lm.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(lm).__name__} predicts no words: load the model with its language-model head "
            f"(AutoModelForCausalLM)"
        )
    return routed.model


def _moe_of(routed: TransformersMoE | Composed | Both) -> TransformersMoE | None:
    """Its MoE blocks, critical or not."""
    if isinstance(routed, Both):
        return routed.moe
    return routed if isinstance(routed, TransformersMoE) else None


def _entry(lm: nn.Module, site: str) -> nn.Module:
    """The layer that a site lies in; the site's own module where there are no layers."""
    try:
        stack = Stack(lm, site)
    except UnsupportedModelError:
        return lm.get_submodule(site)
    layer: nn.Module = stack.layers[stack.index(site)]
    return layer
