"""The router of a chain's iteration. Knows hidden states; not the experts.

Legend: T tokens, H hidden size, E experts, K of them per token, G groups of e experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expertmix.experts.chain_settings import ChainSettings


class ChainRouter(nn.Module):
    """The router of an iteration: a gate, scores, and the K best of them.

    s = softmax(W x), or sigmoid(W x); g_i = s_i for the K largest, or of the best groups only, else
    0 (arXiv 2506.18945, eq. 3; groups as DeepSeek-V2 has them for softmax, V3 for sigmoid). A bias
    moves the selection and never a weight.
    """

    def __init__(self, config: ChainSettings) -> None:
        super().__init__()
        self.config = config
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        kept = torch.float32 if config.router_float32 else None  # whatever the model's is
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size, dtype=kept))
        if config.router_bias:
            bias_E = torch.zeros(config.num_experts, dtype=torch.float32)
            self.e_score_correction_bias = nn.Buffer(bias_E)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route.

        Args:
            hidden_states: (T, H).

        Returns:
            (T, E) logits, (T, K) weights and (T, K) expert numbers, the best first.
        """
        config = self.config
        weight_EH: Tensor = self.weight
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        if config.router_float32:
            hidden_states, weight_EH = hidden_states.to(wide), weight_EH.to(wide)
        logits_TE = nn.functional.linear(hidden_states, weight_EH)
        softmax = config.scores == "softmax"
        scores_TE = logits_TE.softmax(-1, dtype=wide) if softmax else logits_TE.to(wide).sigmoid()
        index_TK = self._eligible(scores_TE).topk(self.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, index_TK)
        if config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        weights_TK = weights_TK * config.routed_scaling_factor
        kept = wide if config.weights_float32 else logits_TE.dtype
        return logits_TE, weights_TK.to(kept), index_TK

    def _eligible(self, scores_TE: Tensor) -> Tensor:
        """What is selected from: biased scores, those of other groups gone."""
        config = self.config
        if config.router_bias:
            scores_TE = scores_TE + self.e_score_correction_bias
        if config.n_group is None or config.topk_group is None:
            return scores_TE
        grouped_TGe = scores_TE.view(len(scores_TE), config.n_group, -1)
        if config.scores == "softmax":
            best_TG = grouped_TGe.amax(-1)
        else:
            best_TG = grouped_TGe.topk(min(2, grouped_TGe.shape[-1]), dim=-1).values.sum(-1)
        chosen_TG = best_TG.topk(config.topk_group, dim=-1).indices
        closed_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter(1, chosen_TG, value=False)
        open_TGe: Tensor = grouped_TGe.masked_fill(closed_TG[..., None], float("-inf"))
        return open_TGe.flatten(1)
