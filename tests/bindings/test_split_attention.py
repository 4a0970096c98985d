"""Attention in two parts is attention in one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from pathway_cases import EXACT, pathway, questions, suffix_of

from expertmix.bindings.split_attention import Beside, attend
from expertmix.testing import NUM_EXPERTS, tiny_moe

ASKED = questions()
PLAIN = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe")


def scored(suffix, *, split):
    """Log-probabilities of the second of two pathways in one batch, and their gradient."""
    suffix.split = split and suffix.split
    with suffix.running():
        states = [reading.state for reading in suffix.read(ASKED)]
        batch = suffix.batch(ASKED, states)
        suffix.score(batch, pathway(suffix.sites, NUM_EXPERTS, seed=1))
        asked = pathway(suffix.sites, NUM_EXPERTS, seed=2)
        found = suffix.score(batch, asked)
        (slope,) = torch.autograd.grad(found.sum(), asked.values)
    return found.detach(), slope


@pytest.mark.parametrize("family", PLAIN)
def test_two_parts_are_one(family):
    """Scores and gradients do not depend on whether keys and values are joined."""
    model = tiny_moe(family)
    split = suffix_of(model)
    found, wanted = scored(split, split=True), scored(suffix_of(model), split=False)
    assert split.split
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) < EXACT


def test_attention_that_makes_keys_of_its_cache_gets_one_part():
    """Latent attention expands what is cached: it is noticed, and joined."""
    model = tiny_moe("deepseek_v2")
    suffix = suffix_of(model)
    found, wanted = scored(suffix, split=True), scored(suffix_of(model), split=False)
    assert not suffix.split
    assert float((found[0] - wanted[0]).abs().max()) < EXACT


def test_the_model_attends_as_before_afterwards():
    """The implementation of attention is given back, also after a failure."""
    model = tiny_moe("olmoe")
    before = model.config._attn_implementation
    suffix = suffix_of(model)
    scored(suffix, split=True)
    assert model.config._attn_implementation == before == "sdpa"


def test_an_import_registers_nothing():
    """Transformers learns of the split at the first pass that needs it."""
    code = (
        "import expertmix.bindings.pathways; from transformers import AttentionInterface as known;"
        "assert not [name for name in known() if 'expertmix' in name]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_mask_keeps_what_it_keeps_in_one_part():
    """`attend` is softmax(QKᵀ·scale + mask)V over both parts side by side, as a plain loop."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 3, 8, generator=generator) for n in (4, 2, 2))
    keys, values = torch.randn(2, 2, 2, 5, 8, generator=generator)
    mask = torch.rand(2, 1, 3, 8, generator=generator) > 0.4
    mask[..., -3:] |= torch.eye(3, dtype=torch.bool)
    Beside(keys, values).mark(key)
    found = attend(None, query, key, value, mask, scaling=0.3)[0]
    every = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    for row in range(2):
        for head in range(4):
            for place in range(3):
                seen = mask[row, 0, place]
                scores = every[0][row, head // 2][seen] @ query[row, head, place] * 0.3
                wanted = scores.softmax(0) @ every[1][row, head // 2][seen]
                torch.testing.assert_close(found[row, place, head], wanted)
