"""The surrogate: what a pathway would lose, judged by questions whose answers are known.

C3PO (arXiv 2504.07964): L(ω) = Σ K(xᵢ, x) ℓ(f(xᵢ, ω), yᵢ) / Σ K(xᵢ, x) over the neighbors xᵢ of a
test sample x, which all run with the test sample's ω. Knows probes and losses; not how a pathway
is improved.

Legend: B test samples, k probes of one, R probes in all, D decision tokens, L sites, E experts,
O options, W tokens, G pathways to compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from expertmix.core.pathway import Mode, Pathway, Pathways
from expertmix.errors import ConfigError
from expertmix.optimize.aggregate import Aggregate, check_aggregate, influence, joined
from expertmix.optimize.probes import Probe, chunks, neighbor_probes
from expertmix.optimize.problem import Problem
from expertmix.optimize.samples import Sample, scores

Objective = Literal["answer", "choice"]


@dataclass(frozen=True, slots=True)
class Rule:
    """How probes are judged.

    Attributes:
        objective: `answer`: the negative mean log-probability per token of the right option.
            `choice`: the cross-entropy of the right option among all options' scores.
        temperature: Of `choice`: scores are divided by it before their softmax. 1 fits summed
            log-probabilities; scores per character or per token are smaller by that many
            characters or tokens, so about 0.05 fits scores per character.
        aggregate: Of the probes of one sample: `mean`, `trimmed` or `median`, all weighted.
        trim: Share of the weight that `trimmed` leaves away at each end.
        limit: Probes in one batch, at most: it bounds memory, and changes no result.
    """

    objective: Objective = "answer"
    temperature: float = 1.0
    aggregate: Aggregate = "mean"
    trim: float = 0.25
    limit: int = 64

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise ConfigError(
                f"objective {self.objective!r} is none of {', '.join(get_args(Objective))}"
            )
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature}: it must be above 0")
        if self.limit < 1:
            raise ConfigError(f"limit={self.limit}: a batch holds at least one probe")
        check_aggregate(self.aggregate, self.trim)

    @property
    def gold_only(self) -> bool:
        """Whether only the right options need to be scored."""
        return self.objective == "answer"

    def losses(self, logprobs_ROW: Tensor, samples: Sequence[Sample]) -> Tensor:
        """(R,) loss of each probe; its samples name the right options."""
        gold_R = torch.tensor([sample.gold or 0 for sample in samples], device=logprobs_ROW.device)
        if self.objective == "choice":
            logits_RO = scores(logprobs_ROW, samples) / self.temperature
            return functional.cross_entropy(logits_RO, gold_R, reduction="none")
        tokens_R = [len(sample.question.options[sample.gold or 0]) for sample in samples]
        return -logprobs_ROW[:, 0].sum(-1) / torch.tensor(tokens_R).to(logprobs_ROW)


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """Probes that are asked together.

    Attributes:
        rows: Their numbers.
        samples: Their questions.
        made: What the model made of them.
    """

    rows: list[int]
    samples: list[Sample]
    made: object


def make_batches(
    pathways: Pathways, probes: Sequence[Probe], rule: Rule, limit: int | None = None
) -> Iterator[Batch]:
    """All probes, in batches of about equal length."""
    found = chunks(probes, pathways.decisions, limit or rule.limit, gold_only=rule.gold_only)
    for rows in found:
        chosen = [probes[row] for row in rows]
        samples = [probe.sample for probe in chosen]
        made = pathways.batch(
            [sample.question for sample in samples],
            [probe.state for probe in chosen],
            only=[probe.gold for probe in chosen] if rule.gold_only else None,
        )
        yield Batch(rows, samples, made)


@dataclass(frozen=True, eq=False, slots=True)
class Evaluation:
    """A surrogate at one pathway per sample.

    Attributes:
        losses: (B,), NaN for a sample without weight.
        per_neighbor: (B, k) loss of each probe, NaN where there is none.
        gradient: (B, D, L, E) of the losses in the pathway, where asked for. 0 at entries of minus
            infinity and for samples without weight.
    """

    losses: Tensor
    per_neighbor: Tensor
    gradient: Tensor | None = None


class Surrogate:
    """Loss of pathways on the probes of their samples.

    Batches are made at the first evaluation and reused by all that follow. Samples do not influence
    each other: a probe's loss reaches its owner's pathway only.

    Args:
        problem: Test samples; of it, the open model and the base's mass are used.
        probes: Who judges; by default the neighbors of the problem.
        objective: See `Rule`, as for the next four.
        temperature: Of the objective `choice`.
        aggregate: How probes are joined.
        trim: Of the aggregate `trimmed`.
        limit: Probes in one batch.
        width: Experts that a decision token calls; all E by default.
        mode: `set`: probes run with the pathway; `add`: their own routing is shifted by it.
        keep: Whether batches are kept; if not, they are made anew each time, in flat memory.

    Raises:
        ConfigError: An impossible setting, or a probe without a right option.
    """

    def __init__(
        self,
        problem: Problem,
        probes: Sequence[Probe] | None = None,
        *,
        objective: Objective = "answer",
        temperature: float = 1.0,
        aggregate: Aggregate = "mean",
        trim: float = 0.25,
        limit: int = 64,
        width: int | None = None,
        mode: Mode = "set",
        keep: bool = True,
    ) -> None:
        near = problem.neighbors
        if probes is None:
            probes = neighbor_probes(problem.reference, near.indices, near.weights)
        self.rule = Rule(objective, temperature, aggregate, trim, limit)
        self.pathways, self.mass, self.mode = problem.pathways, problem.mass, mode
        self.probes, self.width = tuple(probes), width or problem.start.shape[-1]
        _ = [probe.gold for probe in self.probes]  # all are known, or that is an error now
        self.k = max([near.indices.shape[1], *(probe.slot + 1 for probe in self.probes)])
        self.keep = keep
        self._batches: list[Batch] | None = None

    @property
    def weights(self) -> Tensor:
        """(B, k) weight of each probe, 0 where there is none."""
        weights = torch.zeros(self._shape, dtype=torch.float64)
        for probe in self.probes:
            weights[probe.owner, probe.slot] = probe.weight
        return weights

    @property
    def judged(self) -> Tensor:
        """(B,) bool: whether a sample has a probe with weight."""
        return self.weights.sum(1) > 0

    def losses(self, values: Tensor) -> Tensor:
        """(B,) the surrogate at (B, D, L, E) logits."""
        return self.evaluate(values).losses

    def per_neighbor(self, values: Tensor) -> Tensor:
        """(B, k) loss of each probe at (B, D, L, E) logits."""
        return self.evaluate(values).per_neighbor

    def gradient(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) the surrogate and (B, D, L, E) its gradient at (B, D, L, E) logits."""
        found = self.evaluate(values, gradient=True)
        assert found.gradient is not None
        return found.losses, found.gradient

    def evaluate(self, values: Tensor, *, gradient: bool = False) -> Evaluation:
        """All of it at once.

        Args:
            values: (B, D, L, E) logits of each sample's pathway.
            gradient: Whether the gradient is wanted.
        """
        owner_R = torch.tensor([probe.owner for probe in self.probes], dtype=torch.int64)
        slot_R = torch.tensor([probe.slot for probe in self.probes], dtype=torch.int64)
        with torch.inference_mode(False):  # a caller may be in it
            rows_R, slopes = self._rows(values.detach(), owner_R, gradient=gradient)
        per_neighbor_Bk = rows_R.new_full(self._shape, float("nan"))
        per_neighbor_Bk[owner_R, slot_R] = rows_R
        weights_Bk = self.weights.to(rows_R.device)
        shares_Bk = influence(
            per_neighbor_Bk.nan_to_num(nan=torch.inf), weights_Bk, self.rule.aggregate,
            self.rule.trim,
        )  # fmt: skip
        losses_B = joined(per_neighbor_Bk, shares_Bk)
        losses_B = losses_B.masked_fill(weights_Bk.sum(1) == 0, float("nan"))
        if not gradient:
            return Evaluation(losses_B, per_neighbor_Bk)
        share_R = shares_Bk[owner_R, slot_R].to(values)
        shaped_R = share_R.view(-1, 1, 1, 1)
        total = torch.zeros_like(values).index_add(
            0, owner_R.to(values.device), torch.where(shaped_R > 0, slopes * shaped_R, 0.0)
        )
        return Evaluation(losses_B, per_neighbor_Bk, total.where(values.isfinite(), 0.0))

    def many(self, values: Tensor) -> Tensor:
        """(G, B) the surrogate at (G, B, D, L, E) logits: one batch where the limit allows."""
        G, B = values.shape[:2]
        if G * len(self.probes) > self.rule.limit:
            return torch.stack([self.losses(one) for one in values])
        wide = object.__new__(Surrogate)
        wide.__dict__.update(self.__dict__)
        wide.mass, wide._batches = self.mass.repeat(G, 1, 1), None
        wide.probes = tuple(
            replace(probe, owner=probe.owner + copy * B)
            for copy in range(G)
            for probe in self.probes
        )
        return wide.losses(values.flatten(0, 1)).view(G, B)

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self.mass), self.k

    def _rows(self, values: Tensor, owner_R: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor]:
        """(R,) losses and (R, D, L, E) gradients of the probes, each in its own row of values."""
        losses_R = torch.zeros(len(self.probes), device=values.device)
        slopes = values.new_zeros(len(self.probes) if gradient else 0, *values.shape[1:])
        for batch in self._all():
            rows = torch.tensor(batch.rows)
            with torch.set_grad_enabled(gradient):
                mine = values[owner_R[rows]].requires_grad_(gradient)
                mass = self.mass[owner_R[rows], -mine.shape[1] :]
                logprobs = self.pathways.score(
                    batch.made, Pathway(mine, mass, self.width, self.mode)
                )
                found = self.rule.losses(logprobs, batch.samples)
                if gradient:
                    (slope,) = torch.autograd.grad(found.sum(), mine)
                    slopes[rows] = slope.to(slopes)
            losses_R = losses_R.to(found.dtype)
            losses_R[rows] = found.detach().to(losses_R)
        return losses_R, slopes

    def _all(self) -> Iterator[Batch]:
        if self._batches is not None:
            yield from self._batches
            return
        made: list[Batch] = []
        for batch in make_batches(self.pathways, self.probes, self.rule):
            if self.keep:
                made.append(batch)
            yield batch
        if self.keep:
            self._batches = made
