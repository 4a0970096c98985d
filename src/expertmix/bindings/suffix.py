"""Exact suffix evaluation: what a pathway can change is computed again, and nothing else.

A pathway acts on the decision tokens at the critical sites. So the hidden states that enter the
first critical layer stay, and so do the keys and values of the context. A plain pass keeps both;
then one more pathway costs the tail (decision tokens and options) times the critical layers.

Legend: B questions, P context columns, A tail columns, H hidden, O options, W longest option.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from expertmix.bindings.attention import masks, refuse_other
from expertmix.bindings.discovery import Block
from expertmix.bindings.gates import gates_of
from expertmix.bindings.head import Head
from expertmix.bindings.session import Session
from expertmix.bindings.sparing import Fixed
from expertmix.bindings.split_attention import Attended, NotPlainError, splitting
from expertmix.bindings.suffix_batch import SuffixBatch, contexts, predictions_of
from expertmix.bindings.transformers import TransformersMoE
from expertmix.bindings.tree import Tail, Tree, plant
from expertmix.bindings.truncated import Stack, enter, entering
from expertmix.core.pathway import Pathway, Question, Reading
from expertmix.core.site import SiteInfo
from expertmix.errors import ConfigError


class Suffix:
    """A MoE of transformers whose late sites can be read again alone; works inside `running`.

    It is right where every layer is attention over keys and values (a check against full passes
    says so, see `pathways.open_pathways`).

    Args:
        moe: The model.
        blocks: The critical blocks.
        decisions: D, how many tokens of a prompt's end are decision tokens.
        scored: Whether the options' tokens are decision tokens too.
        shift: Whether pathways of mode `add` will come.

    Raises:
        UnsupportedModelError: A model that reads a text in another way.
    """

    exact = True
    notice: str | None = None
    split: bool  # whether attention keeps contexts and tails apart, see `split_attention`

    def __init__(
        self,
        moe: TransformersMoE,
        blocks: Sequence[Block],
        *,
        decisions: int = 1,
        scored: bool = False,
        shift: bool = False,
    ) -> None:
        self.moe, self.blocks = moe, tuple(blocks)
        self.decisions, self.scored, self.shift = decisions, scored, shift
        self.stack = Stack(moe.model, self.blocks[0].info.site.name)
        refuse_other(self.stack.owner.config)
        self.first = self.stack.index(self.blocks[0].info.site.name)
        self.lm: Any = moe.model
        self.late: Any = self.stack.from_layer(self.first)
        self._session = Session(self.moe, self.lm, self.moe, self.sites, shift=shift)
        self.tap = self._session.tap
        self._entry: nn.Module = self.stack.layers[self.first]
        self._head = Head(self.lm)
        self.split = self.stack.owner.config._attn_implementation == "sdpa"
        parameters = inspect.signature(self.stack.owner.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    @cached_property
    def sites(self) -> tuple[SiteInfo, ...]:
        """The critical sites."""
        return tuple(block.info for block in self.blocks)

    def fingerprint(self) -> str:
        """Of the model; read once."""
        return self._session.fingerprint

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hooks are in the model while this is open, and it is at rest.

        Raises:
            UnsupportedRuntimeError: The model is open already, or is being recorded.
        """
        with self._session.running(first=self.blocks[0]):
            yield

    def read(self, questions: Sequence[Question]) -> list[Reading]:
        """One plain pass over all of them."""
        if not questions:
            return []
        tree = plant(questions, self.decisions).to(self._device(self.lm))
        cache, entered = DynamicCache(), list[Tensor]()
        predictions = predictions_of(tree, tree.context)
        self._session.rest()
        self._session.sparing.counting = tree.real.flatten().nonzero().flatten()
        hook = entering(self._entry, entered)
        try:
            with torch.no_grad(), self._head.packing(predictions):
                output = self.lm(
                    input_ids=tree.ids,
                    attention_mask=self._masks(tree, slice(None)),
                    position_ids=tree.position,
                    use_cache=True,
                    **{self._cache_name: cache},
                )
                logprobs = predictions.logprobs(self._head.logits(output, predictions)).cpu()
            return [
                self._reading(tree, row, one, logprobs[row], entered[0][row], cache)
                for row, one in enumerate(questions)
            ]
        finally:
            hook.remove()
            self._session.rest()

    def _reading(
        self, tree: Tree, row: int, one: Question, logprobs: Tensor, hidden: Tensor, cache: Any
    ) -> Reading:
        decide = min(len(one.prompt), self.decisions)
        begin = tree.context - (len(one.prompt) - decide)
        end = tree.context + int(tree.real[row, tree.context :].sum())
        prompt = hidden[begin : tree.context + decide]
        last = row * tree.ids.shape[1] + tree.context + decide - 1
        state = {"hidden": _kept(hidden[tree.context : end])}
        for number in range(self.first, len(self.stack.layers)):
            layer = cache.layers[number]
            state[f"keys.{number}"] = _kept(layer.keys[row, :, begin : tree.context])
            state[f"values.{number}"] = _kept(layer.values[row, :, begin : tree.context])
        return Reading(
            _kept(logprobs[: len(one.options), : max(map(len, one.options))]),
            _kept(prompt[-1]),
            _kept(prompt.float().mean(0)),
            *self.tap.decisions(last, decide, self.decisions),
            state,
        )

    def batch(
        self,
        questions: Sequence[Question],
        states: Sequence[Mapping[str, Tensor]],
        *,
        only: Sequence[int] | None = None,
    ) -> SuffixBatch:
        """Pad the states of questions to one batch."""
        hidden = [state["hidden"] for state in states]
        if only is not None:
            hidden = [self._tail_of(*each) for each in zip(questions, hidden, only, strict=True)]
            questions = [_with(one, number) for one, number in zip(questions, only, strict=True)]
        device = self._device(self._entry)
        tree = plant(questions, self.decisions).to(device)
        if [len(one) for one in hidden] != tree.real[:, tree.context :].sum(1).tolist():
            raise ConfigError(
                "these states are not of these questions, or were read with another number of "
                f"decision tokens than {self.decisions}: read the questions again"
            )
        caches = tuple(
            contexts(states, number, tree.context, device)
            for number in range(self.first, len(self.stack.layers))
        )
        return SuffixBatch(
            nn.utils.rnn.pad_sequence(hidden, batch_first=True).to(device),
            tree.position[:, tree.context :],
            caches,
            self._masks(tree, slice(tree.context, None)),
            tree.slots(self.decisions, self.scored),
            predictions_of(tree, 0),
            tree.real[:, tree.context :].flatten().nonzero().flatten(),
            Fixed(),
            Attended(),
        )

    def _tail_of(self, one: Question, hidden: Tensor, option: int) -> Tensor:
        return hidden[Tail.of(one, max(0, len(one.prompt) - self.decisions)).kept(option)]

    def score(self, batch: Any, pathway: Pathway | None) -> Tensor:
        """Log-probabilities of the options' tokens under a pathway; of a batch made by `batch`."""
        assert isinstance(batch, SuffixBatch), "made by `batch`"
        self._session.rest()
        self._session.sparing.fixed = batch.fixed
        if pathway is not None:
            self.tap.placed = batch.slots.lay(pathway, self.sites, self.shift)
        try:
            output = self._pass(batch)
            return batch.predictions.logprobs(self._head.logits(output, batch.predictions))
        finally:
            self._session.rest()

    def gates(self) -> tuple[Tensor, ...]:
        """Weight matrices of the critical routers; see `core.pathway.TunableRouters`.

        Raises:
            UnsupportedModelError: A router has none.
        """
        return gates_of(self.blocks)

    def routed(self, batch: Any) -> Tensor:
        """Logits that the gates give now at the decision tokens; see `TunableRouters`."""
        assert isinstance(batch, SuffixBatch), "made by `batch`"
        self._session.rest()
        try:
            self._pass(batch)
            rows_BD = batch.slots.prompt_rows()
            return torch.stack([self.tap.logits[info.site][rows_BD] for info in self.sites], 2)
        finally:
            self._session.rest()

    def _pass(self, batch: SuffixBatch) -> Any:
        if self.split:
            try:
                return self._run(batch)
            except NotPlainError:
                self.split = False
        return self._run(batch)

    def _run(self, batch: SuffixBatch) -> Any:
        cache = batch.cache(self.first, split=self.split)
        self._session.sparing.counting = batch.counting
        self.tap.begin(batch.position, batch.position)
        hook = enter(self._entry, batch.hidden)
        try:
            with self._head.packing(batch.predictions), self._splitting():
                return self.late(
                    inputs_embeds=batch.hidden,
                    attention_mask=batch.masks,
                    position_ids=batch.position,
                    use_cache=True,
                    **{self._cache_name: cache},
                )
        finally:
            hook.remove()

    def _splitting(self) -> AbstractContextManager[None]:
        return splitting(self.stack.owner.config, on=self.split)

    def _masks(self, tree: Tree, queries: slice) -> Any:
        return masks(self.stack.owner.config, tree, queries, next(self.lm.parameters()).dtype)

    def _device(self, module: nn.Module) -> torch.device:
        return next(module.parameters()).device


def _with(one: Question, option: int) -> Question:
    return Question(one.prompt, (one.options[option],))


def _kept(values: Tensor) -> Tensor:
    """On its own: no graph, no shared memory, on the CPU."""
    return values.detach().to("cpu", copy=True).contiguous()
