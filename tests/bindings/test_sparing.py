"""What is spared changes nothing."""

from __future__ import annotations

import pytest
import torch
from pathway_cases import EXACT, pathway, questions, suffix_of

from expertmix.core.pathway import Question
from expertmix.testing import NUM_EXPERTS, TOP_K, tiny_moe

LETTERS = [Question(one.prompt, ((5,), (6,))) for one in questions()]
WIDTHS = (NUM_EXPERTS, TOP_K, TOP_K + 1, 1, NUM_EXPERTS - 2)


def scored(suffix, batch, asked):
    found = suffix.score(batch, asked)
    (slope,) = torch.autograd.grad(found.sum(), asked.values)
    return found.detach(), slope


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("texts", [LETTERS, questions()], ids=["letters", "texts"])
def test_a_batch_remembers_nothing_wrong(family, texts):
    """After pathways of any width a batch gives what a fresh one gives, values and gradients."""
    suffix = suffix_of(tiny_moe(family))
    with suffix.running():
        states = [reading.state for reading in suffix.read(texts)]
        used = suffix.batch(texts, states)
        for seed, width in enumerate(WIDTHS * 2):
            found = scored(suffix, used, pathway(suffix.sites, width, seed=seed))
            fresh = suffix.batch(texts, states)
            wanted = scored(suffix, fresh, pathway(suffix.sites, width, seed=seed))
            for one, other in zip(found, wanted, strict=True):
                assert float((one - other).abs().max()) < EXACT


def test_experts_of_the_first_site_are_called_once():
    """With options of one token, a second pathway calls one row of the first site's experts."""
    suffix = suffix_of(tiny_moe("olmoe"))
    rows: list[int] = []
    with suffix.running():
        states = [reading.state for reading in suffix.read(LETTERS)]
        batch = suffix.batch(LETTERS, states)
        experts = suffix.blocks[0].experts
        hook = experts.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        for seed in (1, 2):
            suffix.score(batch, pathway(suffix.sites, NUM_EXPERTS, seed=seed))
        hook.remove()
    assert rows == [len(LETTERS) * NUM_EXPERTS, 1]
