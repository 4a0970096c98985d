"""A chain of experts: one MoE layer that runs C times on the same token (arXiv 2506.18945).

All iterations share their experts; each has, or shares, a router. So experts work on what experts
made in the iteration before, inside one layer.

Knows tokens and experts; no attention, no language model, and not how experts multiply: they are a
module that takes (hidden states, expert numbers, weights), as everywhere in transformers.

Legend: T tokens, H hidden size, E experts, K of them per token.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from expertmix.experts.chain_router import ChainRouter
from expertmix.experts.chain_settings import ChainSettings, check_chain
from expertmix.experts.deferred import one_gradient


class Routed(NamedTuple):
    """What an iteration decided.

    Attributes:
        experts: (T, K) their numbers.
        weights: (T, K).
    """

    experts: Tensor
    weights: Tensor


class Iteration(nn.Module):
    """What is an iteration's own: a norm, a router and a scale, each where the settings want one.

    Args:
        config: Settings.
        number: 0 for the first.
    """

    def __init__(self, config: ChainSettings, number: int) -> None:
        super().__init__()
        own_gate = number == 0 or config.gating == "independent"
        own_norm = config.norm == "per_iteration"
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps) if own_norm else None
        self.gate = ChainRouter(config) if own_gate else None
        self.scale = nn.Parameter(torch.ones(())) if number and config.iteration_scale else None

    def forward(
        self,
        hidden_TH: Tensor,
        number: int,
        chain: Chain,
        before: Routed | None,
        halted_T: Tensor | None,
    ) -> tuple[Tensor, Routed]:
        """One update, before any residual: s_t · F_t(x).

        Args:
            hidden_TH: x.
            number: Which iteration this is; beyond the last one, the last is repeated.
            chain: Whose experts are called.
            before: What the iteration before decided, where that holds on.
            halted_T: (T,) bool, tokens that call nobody any more, or None.
        """
        if self.norm is not None:
            hidden_TH = self.norm(hidden_TH)
        if before is None:
            _, weights_TK, index_TK = chain.gate_of(number)(hidden_TH)
            before = Routed(index_TK, weights_TK)
        weights_TK = before.weights
        if halted_T is not None:
            weights_TK = weights_TK.masked_fill(halted_T[:, None], 0.0)
        update_TH = chain.mix(hidden_TH, before.experts, weights_TK, number, halted_T)
        return (update_TH if self.scale is None else update_TH * self.scale), before


class Chain(nn.Module):
    """C iterations over shared experts, with norm and residual: a whole feed-forward sub-layer.

    With F_t(x) = Σ_m Ê_m(x) + Σ_i g_{t,i} E_i(x), t = 1..C (arXiv 2506.18945, eq. 2-4):

    - residual `inner`: x_t = x_{t-1} + F_t(x_{t-1}), y = x_C; `outer`: x_t = F_t(x_{t-1}),
      y = x_C + x_0; `init`: x_t = F_t(x_{t-1}) + x_0, y = x_C; `inner+outer`: the former with + x_0
      at the end; `none`: x_t = F_t(x_{t-1}), y = x_C.
    - norm `per_iteration`: x_0 is the residual stream, and F_t reads RMS_t(x_{t-1}): with C = 1, a
      plain pre-norm MoE. `once`: x_0 = RMS(stream), and the stream itself goes on no further, as in
      the paper's code and its MoE baseline.

    Args:
        config: Settings; `active_iterations`, `halting_threshold` and `checkpoint_iterations` are
            read at every call.
        experts: Takes (hidden (T, H), numbers (T, K), weights (T, K)), gives (T, H).
        shared: The shared experts, (T, H) to (T, H), or None.
    """

    def __init__(
        self, config: ChainSettings, experts: nn.Module, shared: nn.Module | None = None
    ) -> None:
        super().__init__()
        check_chain(config)
        once, gated = config.norm == "once", shared is not None and config.shared_expert_gate
        self.config = config
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps) if once else None
        self.iterations = nn.ModuleList(
            Iteration(config, number) for number in range(config.num_iterations)
        )
        self.experts = experts
        self.shared_experts = shared
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if gated else None

    @property
    def depth(self) -> int:
        """How many iterations run: `active_iterations`, or C."""
        return self.config.active_iterations or len(self.iterations)

    def iteration(self, number: int) -> Iteration:
        """The module that runs as iteration `number`; the last one repeats itself."""
        found = self.iterations[min(number, len(self.iterations) - 1)]
        assert isinstance(found, Iteration)
        return found

    def gate_of(self, number: int) -> ChainRouter:
        """The router of an iteration."""
        found = self.iteration(number).gate or self.iteration(0).gate
        assert found is not None
        return found

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, H) residual stream to (…, H)."""
        # a checkpointed iteration is to hold nothing, so its gradients do not wait for others
        alone = self.depth == 1 or self.config.checkpoint_iterations
        if alone or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._run(hidden_states)
        with one_gradient():
            return self._run(hidden_states)

    def _run(self, hidden_states: Tensor) -> Tensor:
        config = self.config
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.norm is not None:
            x_TH = self.norm(x_TH)
        start_TH = x_TH
        routed: Routed | None = None
        halted_T: Tensor | None = None
        for number in range(self.depth):
            held = routed if config.gating == "fixed" else None
            update_TH, routed = self._update(x_TH, number, held, halted_T)
            moved_TH = self._join(x_TH, update_TH, start_TH)
            if halted_T is not None:
                moved_TH = torch.where(halted_T[:, None], x_TH, moved_TH)
            if config.halting_threshold is not None and not self.training:
                small_T = relative_size(moved_TH - x_TH, x_TH) < config.halting_threshold
                halted_T = small_T if halted_T is None else halted_T | small_T
            x_TH = moved_TH
            if halted_T is not None and bool(halted_T.all()):
                break
        if "outer" in config.residual:
            x_TH = x_TH + start_TH
        return x_TH.reshape(hidden_states.shape)

    def mix(
        self,
        hidden_TH: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        number: int,
        halted_T: Tensor | None,
    ) -> Tensor:
        """What routed and shared experts give."""
        routed_TH: Tensor = self.experts(hidden_TH, index_TK, weights_TK)
        once = self.config.shared_experts == "once"
        if self.shared_experts is None or (once and number):
            return routed_TH
        if halted_T is None:
            return routed_TH + self._shared(hidden_TH)
        running = (~halted_T).nonzero().flatten()
        return routed_TH.index_add(0, running, self._shared(hidden_TH[running]))

    def _shared(self, hidden_TH: Tensor) -> Tensor:
        assert self.shared_experts is not None
        given_TH: Tensor = self.shared_experts(hidden_TH)
        if self.shared_expert_gate is None:
            return given_TH
        weight_T1: Tensor = self.shared_expert_gate(hidden_TH).sigmoid()
        return weight_T1 * given_TH

    def _update(
        self, x_TH: Tensor, number: int, held: Routed | None, halted_T: Tensor | None
    ) -> tuple[Tensor, Routed]:
        run: Any = self.iteration(number)
        if self.config.checkpoint_iterations and self.training and torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False)
        found: tuple[Tensor, Routed] = run(x_TH, number, self, held, halted_T)
        return found

    def _join(self, x_TH: Tensor, update_TH: Tensor, start_TH: Tensor) -> Tensor:
        if "inner" in self.config.residual:
            return x_TH + update_TH
        return update_TH + start_TH if self.config.residual == "init" else update_TH


def relative_size(update_TH: Tensor, x_TH: Tensor) -> Tensor:
    """(T,) ‖update‖ / ‖x‖, in float32: how large an update is beside what it is added to."""
    size_T: Tensor = torch.linalg.vector_norm(x_TH.float(), dim=-1)
    moved_T: Tensor = torch.linalg.vector_norm(update_TH.float(), dim=-1)
    return moved_T / size_T.clamp(min=1e-12)
