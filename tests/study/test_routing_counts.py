"""Where the tokens of texts went, at every level of sites."""

from __future__ import annotations

import pytest
import torch

from expertmix.core.decision import Decision
from expertmix.core.site import Site, SiteInfo
from expertmix.core.tokens import Tokens
from expertmix.core.trace import Chunk
from expertmix.study import routing_counts
from expertmix.study.routing_counts import Levels, RoutingCounter

NAMES = ("ada", "bob", "cyd", "dan")
SITES = tuple(
    SiteInfo(Site(f"model.layers.{layer}.{kind}"), 4, 2, NAMES)
    for layer in range(3)
    for kind in ("self_attn.q_proj", "mlp.up_proj")
)


def a_pass(rows: int, columns: int, seed: int, first: int = 0) -> Chunk:
    """Random decisions; the last column of the last row is padding, one site does not run."""
    generator = torch.Generator().manual_seed(seed)
    size = rows * columns
    real = torch.ones(size, dtype=torch.bool)
    real[-1] = False
    tokens = Tokens(
        torch.arange(rows).repeat_interleave(columns) + first,
        torch.arange(columns).repeat(rows),
        torch.zeros(size, dtype=torch.int64),
        real,
    )
    decisions = {}
    for info in SITES[:-1]:
        indices = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(size)])
        weights = torch.randint(1, 4, (size, 2), generator=generator) / 4
        decisions[info.site] = Decision(indices, weights, 4)
    return Chunk(tokens, decisions)


def naive(chunks: list[tuple[Chunk, list[int]]], labels: list[str | None], members: list[int]):
    """Token by token in plain Python: right, chosen and mass of each text."""
    right = [0.0] * len(labels)
    chosen = [[0.0] * 4 for _ in labels]
    mass = [[0.0] * 4 for _ in labels]
    for chunk, numbers in chunks:
        start = int(chunk.tokens.sample.min())
        for token in range(len(chunk.tokens)):
            if not chunk.tokens.real[token]:
                continue
            text = numbers[int(chunk.tokens.sample[token]) - start]
            total = [0.0] * 4
            for site in members:
                decision = chunk.decisions.get(SITES[site].site)
                if decision is not None:
                    for expert, weight in zip(
                        decision.indices[token].tolist(),
                        decision.weights[token].tolist(),
                        strict=True,
                    ):
                        total[expert] += weight
            best = [expert for expert in range(4) if total[expert] == max(total) > 0]
            for expert in range(4):
                mass[text][expert] += total[expert]
                part = 1 / len(best) if expert in best else 0.0
                chosen[text][expert] += part
                if NAMES[expert] == labels[text]:
                    right[text] += part
    return right, chosen, mass


@pytest.mark.parametrize("cells", [50, 16_000_000])
def test_counts_equal_a_plain_loop(cells, monkeypatch):
    """At all sites together, each layer, each kind and each site; in blocks of any size."""
    monkeypatch.setattr(routing_counts, "_CELLS", cells)
    labels = ["ada", "cyd", None, "poetry", "dan"]
    passes = [(a_pass(3, 5, 0), [4, 0, 2]), (a_pass(2, 7, 1, first=3), [1, 3])]
    counter = RoutingCounter(SITES, labels)
    for chunk, numbers in passes:
        counter.add(chunk, numbers)
    found = counter.result()
    levels = Levels.of(SITES)
    for row, name in enumerate(levels.names):
        members = levels.member[row].nonzero().flatten().tolist()
        right, chosen, mass = naive(passes, labels, members)
        assert found.right[:, row].tolist() == pytest.approx(right), name
        if not row:
            torch.testing.assert_close(found.chosen, torch.tensor(chosen, dtype=torch.float64))
            torch.testing.assert_close(found.mass, torch.tensor(mass, dtype=torch.float64))
    assert found.tokens.tolist() == [5, 7, 4, 6, 5]
    assert found.own.tolist() == [0, 2, -1, -1, 3]


def test_a_text_goes_where_most_of_its_weight_went():
    """Not where most of its tokens went; texts without an adapter of their own are never right."""
    labels = ["ada", None]
    counter = RoutingCounter(SITES[:1], labels)
    tokens = Tokens(
        torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 0]), torch.zeros(4).long(),
        torch.ones(4).bool(),
    )  # fmt: skip
    decision = Decision(torch.tensor([[0], [1], [1], [0]]), torch.tensor([[9.0], [1], [1], [1]]), 4)
    counter.add(Chunk(tokens, {SITES[0].site: decision}), [0, 1])
    found = counter.result()
    assert found.chosen[0].tolist() == [1, 2, 0, 0]
    assert found.right_texts.tolist() == [1, 0]
    assert found.chance == 0.25


def test_levels_have_names_in_order():
    """All sites, layers, kinds, then single sites."""
    levels = Levels.of(SITES)
    assert levels.layers == ("model.layers.0", "model.layers.1", "model.layers.2")
    assert levels.kinds == ("self_attn.q_proj", "mlp.up_proj")
    assert levels.names[0] == "all sites"
    assert levels.names[6:] == tuple(str(info.site) for info in SITES)
    assert levels.member.sum(1).tolist() == [6, 2, 2, 2, 3, 3, 1, 1, 1, 1, 1, 1]
