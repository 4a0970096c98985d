"""Sites that are modules of layers, by layer and by kind."""

from __future__ import annotations

import pytest
import torch

from expertmix.attribute import usage
from expertmix.attribute.modules import by, is_modular, mean_weights, same_experts, split, winners
from expertmix.core.decision import Decision
from expertmix.core.site import Site, SiteInfo
from expertmix.core.tokens import Tokens
from expertmix.core.trace import Chunk, Memory, Trace, TraceMeta

NAMES = ("ada", "bob", "cyd")


def infos(*names: str, experts: tuple[str, ...] = NAMES) -> tuple[SiteInfo, ...]:
    return tuple(SiteInfo(Site(name), 3, 2, experts) for name in names)


MODULES = infos(
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.up_proj",
    "lm_head",
)


def made(*rows: tuple[tuple[int, float], ...]) -> Decision:
    return Decision(
        torch.tensor([[expert for expert, _ in row] for row in rows]),
        torch.tensor([[weight for _, weight in row] for row in rows]),
        3,
    )


@pytest.fixture
def trace() -> Trace:
    """Two tokens with two labels; the last module never runs."""
    decisions = {
        MODULES[0].site: made(((0, 0.5), (1, 0.5)), ((2, 1.0), (-1, 0.0))),
        MODULES[1].site: made(((1, 0.75), (2, 0.25)), ((2, 0.5), (0, 0.5))),
        MODULES[2].site: made(((0, 1.0), (1, 0.0)), ((1, 0.5), (2, 0.5))),
        MODULES[3].site: made(((0, 0.5), (2, 0.5)), ((0, 0.5), (1, 0.5))),
    }
    tokens = Tokens(
        torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([5, 6]), torch.tensor([True, True])
    )
    meta = TraceMeta("0" * 64, "tiny", MODULES)
    return Trace(meta, Memory([Chunk(tokens, decisions, {0: "ada", 1: "bob"})]))


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.7.mlp.up_proj", "model.layers.7", "mlp.up_proj"),
        ("transformer.h.0.attn.c_attn", "transformer.h.0", "attn.c_attn"),
        ("model.layers.3.experts.5.w1", "model.layers.3", "experts.5.w1"),
        ("lm_head", "lm_head", "lm_head"),
        ("model.layers.3", "model.layers.3", "model.layers.3"),
    ],
)
def test_a_layer_ends_at_the_first_number(name, layer, kind):
    """What comes after it is the kind of module."""
    found = split(Site(name))
    assert (found.layer, found.kind) == (layer, kind)


def test_counts_by_layer_are_sums_over_modules(trace):
    """A token counts once for each module; labels, calls, first choices and weights add up."""
    counted = usage(trace, pairs=())
    layers = by(counted, lambda module: module.layer)
    assert [site.site.name for site in layers] == ["model.layers.0", "model.layers.1", "lm_head"]
    first = layers.sites[0]
    assert first.total.tokens == 4
    assert first.total.calls.tolist() == [2, 2, 3]
    assert first.total.weight.tolist() == [1.0, 1.25, 1.75]
    assert first.tally("ada").weight.tolist() == [0.5, 1.25, 0.25]
    assert first.info.experts == NAMES
    assert layers.sites[2].total.tokens == 0
    assert (layers.tokens, layers.labels) == (counted.tokens, counted.labels)


def test_counts_by_kind_are_sums_over_layers(trace):
    """The same of another side."""
    kinds = by(usage(trace, pairs=()), lambda module: module.kind)
    assert [site.site.name for site in kinds] == ["self_attn.q_proj", "mlp.up_proj", "lm_head"]
    assert kinds.sites[0].total.weight.tolist() == [1.5, 1.0, 1.5]


def test_weights_of_a_layer_are_means_over_modules_that_ran(trace):
    """None where none did."""
    (chunk,) = trace.chunks()
    found = mean_weights(chunk.decisions, [MODULES[0].site, MODULES[1].site, MODULES[4].site])
    assert found is not None
    assert found.tolist() == [[0.25, 0.625, 0.125], [0.25, 0.0, 0.75]]
    assert mean_weights(chunk.decisions, [MODULES[4].site]) is None


def test_winners_that_tie_divide_one():
    """Also where rounding tells them apart; without any weight nobody wins."""
    weights = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.4 + 1e-7, 0.2], [0.0, 0.0, 0.0], [1, 1, 1]])
    assert winners(weights).tolist() == [
        [0, 1, 0], [0.5, 0.5, 0], [0, 0, 0], pytest.approx([1 / 3] * 3),
    ]  # fmt: skip


def test_only_like_experts_in_fewer_layers_are_modular():
    """Numbered experts, different names, steps, and one site per layer are not."""
    assert is_modular(MODULES)
    assert not is_modular(infos("model.layers.0.mlp", "model.layers.1.mlp"))
    assert not is_modular(infos(*(info.site.name for info in MODULES), experts=()))
    assert not is_modular((*MODULES, SiteInfo(Site("model.layers.1.x"), 3, 2, ("a", "b", "c"))))
    assert not is_modular((*MODULES, SiteInfo(Site("model.layers.1.x", 1), 3, 2, NAMES)))
    assert not same_experts(())
