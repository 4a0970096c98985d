"""RoMA: the last routers are trained once, so that a test sample costs nothing extra.

Knows gates as weight matrices and the reference set as a training set; puts every weight back.

Legend: B samples, N references, M rows of a training step, D decision tokens, L sites, E experts,
k neighbors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from expertmix.core.pathway import Mode, Pathway, TunableRouters
from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError, UnsupportedModelError
from expertmix.optimize.memo import Memo, source_of
from expertmix.optimize.probes import Probe, neighbor_probes
from expertmix.optimize.problem import Problem, Solution
from expertmix.optimize.schedule import Mover, cosine
from expertmix.optimize.surrogate import Objective, Rule, make_batches
from expertmix.optimize.trust import divergence


@dataclass(frozen=True)
class RouterTuning:
    """RoMA (arXiv 2511.07419): min_W meanᵢ ℓ(xᵢ, yᵢ) + λ meanᵢ Σⱼ Wᵢⱼ ‖rᵢ − rⱼ‖².

    rᵢ is the pathway of reference i as distributions over experts, all sites side by side; j are
    its `k` most similar references (as the search for neighbors measures it), and Wᵢⱼ that
    similarity, negative ones 0, with a sum of 1 over j. All references succeeded, so neighbors are
    successful ones.

    The trained routers decide at the decision tokens, as everywhere in C3PO; the context keeps the
    base's. So it is exact with cached contexts, and a sample's solution is the pathway that the
    trained routers give it: an ordinary intervention. All experts are called while training, so
    that all have gradients. Scores of a router follow its logits through the link (identity or
    log-sigmoid) that explains its start.

    Learned once for a model and a reference set, and kept in `memo`; the model's weights are as
    before when `solve` returns or fails.

    Attributes:
        steps: Of Adam; 0 leaves the base alone.
        lr: Its first rate, on the gates' weights; falls to a thousandth on a cosine.
        smooth: λ.
        k: Neighbors of a reference.
        rows: References in a step, without their neighbors.
        most: References that are trained on, at most: a seeded draw; None for all.
        objective: See `Rule`, as for the next two.
        temperature: Of the objective `choice`.
        limit: Questions in one batch outside of training.
        seed: Of draws.
        memo: Holds the gates learned from the model and references of the last call.

    Raises:
        ConfigError: An impossible setting.
    """

    needs_labels: ClassVar[bool] = False

    steps: int = 50
    lr: float = 1e-3
    smooth: float = 0.1
    k: int = 3
    rows: int = 16
    most: int | None = 256
    objective: Objective = "answer"
    temperature: float = 1.0
    limit: int = 64
    seed: int = 0
    memo: Memo[tuple[Tensor, ...]] = field(
        default_factory=Memo, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        _ = self.rule  # checks its settings
        bounds = {"steps": 0, "lr": 0, "smooth": 0, "k": 0, "rows": 1, "most": 1}
        for key, least in bounds.items():
            value = getattr(self, key)
            if value is not None and not value >= least:
                raise ConfigError(f"{key}={value}: it must be at least {least}")

    @property
    def name(self) -> str:
        """`router_tuning`."""
        return "router_tuning"

    @property
    def mode(self) -> Mode:
        """Pathways are set."""
        return "set"

    @property
    def rule(self) -> Rule:
        """How references are judged."""
        return Rule(self.objective, self.temperature, limit=self.limit)

    def solve(self, problem: Problem, progress: Progress = quiet) -> Solution:
        """See `Method`.

        Raises:
            UnsupportedModelError: The routers have no weights that could be trained.
        """
        pathways = problem.pathways
        if not isinstance(pathways, TunableRouters):
            raise UnsupportedModelError(
                "router_tuning trains the routers' weights, and these pathways give no access to "
                "them; use another method, such as global_delta"
            )
        weights = self.memo.get(
            source_of(problem), lambda: self._learn(problem, pathways, progress)
        )
        probes = [
            Probe(row, 0, 1.0, sample, reading.state)
            for row, (sample, reading) in enumerate(
                zip(problem.samples, problem.readings, strict=True)
            )
        ]
        before = self._routed(pathways, probes)
        with changed_gates(pathways.gates(), weights):
            after = self._routed(pathways, probes)
        changed = (before != after).flatten(1).any(1)
        moved = follow(problem.start, before.to(problem.start), after.to(problem.start))
        values = torch.where(changed.view(-1, 1, 1, 1), moved, problem.start)
        notes = {"kl": divergence(values, problem.start)}
        return Solution(values, "set", changed, notes=notes)

    def _learn(
        self, problem: Problem, pathways: TunableRouters, progress: Progress
    ) -> tuple[Tensor, ...]:
        """Trained weights of every gate."""
        reference, gates = problem.reference, pathways.gates()
        tuned = tuple(gate.detach().float().clone() for gate in gates)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(reference.samples), generator=generator)[: self.most]
        if not len(order) or not self.steps:
            return tuned
        similarity_NN = problem.finder.index.similarities(reference.embeddings[order])[:, order]
        near_Nk, weights_Nk = nearest_others(similarity_NN, self.k)
        probes = neighbor_probes(reference, order[:, None], torch.ones(len(order), 1))
        base = self._routed(pathways, probes)
        before = base, reference.start[order].to(base), reference.mass[order].to(base)
        movers = [Mover("adam") for _ in gates]
        for step in range(self.steps):
            anchors = torch.randperm(len(order), generator=generator)[: self.rows]
            near = near_Nk[anchors], weights_Nk[anchors]
            slopes = self._slopes(pathways, tuned, probes, anchors, near, before)
            rate = cosine(step, self.steps, self.lr, self.lr * 1e-3)
            tuned = _moved(tuned, slopes, movers, rate)
            progress("training routers", step + 1, self.steps)
        return tuned

    def _slopes(
        self, pathways: TunableRouters, tuned: Sequence[Tensor], probes: Sequence[Probe],
        anchors: Tensor, near: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor, Tensor],
    ) -> Sequence[Tensor | None]:  # fmt: skip
        """Gradient of one step: anchors are judged, and drawn to their neighbors.

        Answers are judged with the base's gates, given the trained ones' decisions: only these
        will be used. So the slope in the decisions is taken first, then theirs in the gates.
        """
        near_Mk, weights_Mk = near
        rows, place = torch.unique(torch.cat([anchors, near_Mk.flatten()]), return_inverse=True)
        mine, theirs = place[: len(anchors)], place[len(anchors) :].view_as(near_Mk)
        chosen = [probes[row] for row in rows.tolist()]
        logits, start, mass = (one[rows] for one in before)
        batch = pathways.batch(
            [one.sample.question for one in chosen], [one.state for one in chosen],
            only=[one.gold for one in chosen] if self.rule.gold_only else None,
        )  # fmt: skip
        gates = pathways.gates()
        with changed_gates(gates, tuned):
            values = follow(start, logits, pathways.routed(batch).to(start))
        leaf = values.detach().requires_grad_()
        with torch.enable_grad():
            scored = pathways.score(batch, Pathway(leaf, mass, leaf.shape[-1]))
            judged = self.rule.losses(scored, [one.sample for one in chosen])[mine].mean()
            (slope,) = torch.autograd.grad(judged, leaf)
        with changed_gates(gates, tuned):
            routes = values.softmax(-1).flatten(1)
            away = (routes[mine][:, None] - routes[theirs]).square().sum(-1)
            drawn = self.smooth * (away * weights_Mk.to(away)).sum(1).mean()
            total = (values * slope).sum() + drawn
            return torch.autograd.grad(total, list(gates), allow_unused=True)

    def _routed(self, pathways: TunableRouters, probes: Sequence[Probe]) -> Tensor:
        """(R, D, L, E) what the gates give the probes as they are now."""
        found: dict[int, Tensor] = {}
        for batch in make_batches(pathways, probes, Rule("choice", limit=self.limit)):
            with torch.no_grad():
                found.update(zip(batch.rows, pathways.routed(batch.made), strict=True))
        return torch.stack([found[row] for row in range(len(probes))])


@contextmanager
def changed_gates(gates: Sequence[Tensor], weights: Sequence[Tensor]) -> Iterator[None]:
    """Gates hold other weights, and have gradients, while this is open."""
    kept = [(gate.detach().clone(), gate.requires_grad) for gate in gates]
    try:
        for gate, weight in zip(gates, weights, strict=True):
            gate.requires_grad_(True)
            gate.data.copy_(weight)
        with torch.enable_grad():
            yield
    finally:
        for gate, (weight, flag) in zip(gates, kept, strict=True):
            gate.data.copy_(weight)
            gate.requires_grad_(flag)


def follow(start_BDLE: Tensor, before_BDLE: Tensor, after_BDLE: Tensor) -> Tensor:
    """(B, D, L, E) the start, moved as the gates' logits moved.

    ω' = ω + link(after) − link(before), with the link for which ω − link(before) varies least over
    the experts of a token: the identity, or log-sigmoid.
    """
    spreads, moves = [], []
    for link in (lambda logits: logits, functional.logsigmoid):
        offset = start_BDLE - link(before_BDLE)
        spreads.append(offset.std(-1, keepdim=True))
        moves.append(link(after_BDLE) - link(before_BDLE))
    return start_BDLE + torch.where(spreads[0] <= spreads[1] + 1e-5, moves[0], moves[1])


def nearest_others(similarity_NN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(N, k) most similar others of each, and their weights: similarities that sum to 1, or 0."""
    others_NN = similarity_NN.clone().fill_diagonal_(float("-inf"))
    best = others_NN.topk(min(k, len(others_NN) - 1), dim=1)
    weights_Nk = best.values.clamp(min=0)
    total_N1 = weights_Nk.sum(1, keepdim=True)
    return best.indices, torch.where(total_N1 > 0, weights_Nk / total_N1, 0.0)


def _moved(
    weights: Sequence[Tensor], slopes: Sequence[Tensor | None], movers: Sequence[Mover], rate: float
) -> tuple[Tensor, ...]:
    return tuple(
        weight
        if slope is None or not bool(slope.isfinite().all())
        else weight + mover.move(slope.to(weight), rate)
        for weight, slope, mover in zip(weights, slopes, movers, strict=True)
    )
