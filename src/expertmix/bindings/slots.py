"""The decision tokens of a pass, and a pathway laid over them.

Knows tokens by their flat numbers in a pass; no model.

Legend: n decision tokens, B questions, D decision tokens of a prompt, L sites, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.core.pathway import Pathway
from expertmix.core.site import SiteInfo
from expertmix.errors import ConfigError


@dataclass(frozen=True, eq=False, slots=True)
class Placed:
    """A pathway, laid over the tokens of one pass.

    Attributes:
        rows: (n,) the flat numbers of the decision tokens.
        values: (n, L, E) logits.
        mass: (n, L) sum of the weights, in mode `set`.
        width: How many experts each calls.
        add: Whether values shift the router's own logits.
    """

    rows: Tensor
    values: Tensor
    mass: Tensor
    width: int
    add: bool


@dataclass(frozen=True, eq=False, slots=True)
class Slots:
    """The decision tokens of a pass, and whose they are.

    Attributes:
        rows: (n,) their flat numbers.
        question: (n,) number of the question of each.
        back: (n,) how many tokens before the prompt's last one each is; 0 in options.
        questions: B.
        decisions: D.
    """

    rows: Tensor
    question: Tensor
    back: Tensor
    questions: int
    decisions: int

    def lay(self, pathway: Pathway, infos: Sequence[SiteInfo], shift: bool) -> Placed:
        """A pathway over these tokens.

        Raises:
            ConfigError: It does not fit, or is a shift where none was to come.
        """
        self._check(pathway, infos, shift)
        values, device = pathway.values, self.rows.device
        slot = (values.shape[1] - 1 - self.back).clamp(min=0)
        return Placed(
            self.rows,
            values.to(device)[self.question, slot],
            pathway.mass.to(device).expand(values.shape[:3])[self.question, slot],
            pathway.width,
            pathway.mode == "add",
        )

    def prompt_rows(self) -> Tensor:
        """(B, D) flat numbers of the prompts' last tokens; a short prompt repeats its first one."""
        nowhere = int(self.rows.max()) + 1
        slot = self.question * self.decisions + self.decisions - 1 - self.back
        found = torch.full((self.questions * self.decisions,), nowhere, device=self.rows.device)
        found = found.scatter_reduce(0, slot, self.rows, "amin").view(-1, self.decisions)
        for place in range(self.decisions - 2, -1, -1):
            later = found[:, place + 1]
            found[:, place] = found[:, place].where(found[:, place] < nowhere, later)
        return found

    def _check(self, pathway: Pathway, infos: Sequence[SiteInfo], shift: bool) -> None:
        got, experts = tuple(pathway.values.shape), infos[0].num_experts
        depths = sorted({1, self.decisions})
        wanted = [(self.questions, depth, len(infos), experts) for depth in depths]
        if got not in wanted:
            raise ConfigError(
                f"a pathway has values of shape {got}, this batch and its sites take "
                f"{' or '.join(map(str, wanted))} (questions, decision tokens, sites, experts)"
            )
        if pathway.width < 1:
            raise ConfigError(f"a pathway calls {pathway.width} experts: the width starts at 1")
        if pathway.mode == "add" and not shift:
            raise ConfigError(
                "a pathway of mode 'add' shifts the router's own logits: open the pathways with "
                "shift=True"
            )
