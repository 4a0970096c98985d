"""The base's pathway, as logits."""

from __future__ import annotations

import pytest
import torch

from expertmix.bindings.suffix import Suffix
from expertmix.bindings.transformers import TransformersMoE
from expertmix.core.pathway import Pathway, Reading
from expertmix.core.site import Site, SiteInfo
from expertmix.errors import ConfigError, UnsupportedModelError
from expertmix.optimize.start import start
from expertmix.testing import tiny_moe

from .world import open_suffix, samples

FAMILIES = [
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss",
]  # fmt: skip
INFOS = (SiteInfo(Site("a"), 6, 3),)


def reading(logits, indices, weights) -> Reading:
    """One token at one site."""
    empty = torch.zeros(1)
    return Reading(
        torch.zeros(1, 1), empty, empty, torch.tensor(logits)[None, None].float(),
        torch.tensor(indices)[None, None], torch.tensor(weights)[None, None].float(), {},
    )  # fmt: skip


def hard(pathways, readings, questions, decisions=1):
    """Log-probabilities under the start, with K experts."""
    values, mass = start(readings, pathways.sites, decisions=decisions)
    batch = pathways.batch(questions, [one.state for one in readings])
    return pathways.score(batch, Pathway(values, mass, pathways.sites[0].top_k))


@pytest.mark.parametrize("decisions", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_the_base(family, decisions):
    """Called with the router's K, the start gives the base's log-probabilities to 1e-6."""
    questions = [sample.question for sample in samples(6)]
    with open_suffix(family, decisions=decisions) as pathways, torch.no_grad():
        readings = pathways.read(questions)
        found = hard(pathways, readings, questions, decisions)
    for row, one in enumerate(readings):
        options, width = one.logprobs.shape
        torch.testing.assert_close(found[row, :options, :width], one.logprobs, rtol=0, atol=1e-6)


def test_a_bias_and_groups_may_choose_others_than_the_best_scores():
    """DeepSeek-V3 with a strong correction bias and groups: the chosen ones stay the top K."""
    tiny = tiny_moe("deepseek_v3", n_group=5, topk_group=2)
    for name, buffer in tiny.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-1, 1, len(buffer)))
    moe = TransformersMoE(tiny)
    questions = [sample.question for sample in samples(4)]
    pathways = Suffix(moe, moe.blocks[-2:])
    with pathways.running(), torch.no_grad():
        readings = pathways.read(questions)
        found = hard(pathways, readings, questions)
        values, _ = start(readings, pathways.sites)
    best_by_score = torch.stack([one.logits for one in readings]).topk(3).indices
    chosen = torch.stack([one.indices for one in readings])
    assert not torch.equal(best_by_score.sort().values, chosen.sort().values)
    assert torch.equal(values.topk(3).indices.sort().values, chosen.sort().values)
    for row, one in enumerate(readings):
        options, width = one.logprobs.shape
        torch.testing.assert_close(found[row, :options, :width], one.logprobs, rtol=0, atol=1e-6)


def test_softmax_logits_are_kept_up_to_a_shift():
    """Where the rule is a softmax, all experts keep the gate's logits, less one constant."""
    logits = torch.tensor([3.0, 2.0, 1.0, 0.5, -1.0, -2.0])
    weights = logits.softmax(0)[:3].tolist()
    values, mass = start([reading(logits.tolist(), [0, 1, 2], weights)], INFOS)
    torch.testing.assert_close(values[0, 0, 0] - values[0, 0, 0, 0], logits - logits[0])
    torch.testing.assert_close(mass[0, 0, 0], torch.tensor(sum(weights)))
    assert values[0, 0, 0, :3].logsumexp(0).abs() < 1e-6


def test_sigmoid_routers_use_log_sigmoid():
    """Where weights are sigmoids, the others' values are log-sigmoids of their logits."""
    logits = torch.tensor([3.0, 2.0, 1.0, 0.5, -1.0, -2.0])
    weights = (logits.sigmoid()[:3] * 2.5).tolist()
    values, mass = start([reading(logits.tolist(), [0, 1, 2], weights)], INFOS)
    scores = torch.nn.functional.logsigmoid(logits)
    torch.testing.assert_close(values[0, 0, 0] - values[0, 0, 0, 0], scores - scores[0])
    torch.testing.assert_close(mass[0, 0, 0], torch.tensor(sum(weights)))


def test_weights_that_no_link_explains_are_repeated():
    """Whatever the rule: softmax over the chosen times the mass are the weights."""
    values, mass = start([reading([0.0, 5, 1, 2, -3, 9], [4, 0, 2], [0.7, 0.1, 0.4])], INFOS)
    best, experts = values[0, 0, 0].topk(3)
    assert experts.tolist() == [4, 2, 0]
    torch.testing.assert_close(best.softmax(0) * mass[0, 0, 0], torch.tensor([0.7, 0.4, 0.1]))


def test_free_slots_and_faint_experts_change_nothing_that_can_be_seen():
    """Slots without an expert (-1) and experts of weight 0 count below 1e-8 of the mass."""
    values, mass = start([reading([0.0, 5, 1, 2, -3, 9], [1, -1, -1], [0.5, 0.0, 0.0])], INFOS)
    best, experts = values[0, 0, 0].topk(3)
    assert int(experts[0]) == 1
    assert float((best.softmax(0) * mass[0, 0, 0])[1:].max()) < 1e-8
    values, _ = start([reading([0.0, 5, 1, 2, -3, 9], [1, 3, 2], [0.5, 0.2, 0.0])], INFOS)
    assert sorted(values[0, 0, 0].topk(3).indices.tolist()) == [1, 2, 3]


def test_a_token_is_the_same_alone_and_in_a_batch():
    """No reading influences another's start."""
    with open_suffix() as pathways:
        readings = pathways.read([sample.question for sample in samples(5)])
    together, mass = start(readings, pathways.sites)
    for row, one in enumerate(readings):
        alone, alone_mass = start([one], pathways.sites)
        assert torch.equal(alone[0], together[row])
        assert torch.equal(alone_mass[0], mass[row])


def test_what_cannot_be_a_start_is_told():
    """No readings, other sites, negative weights."""
    with pytest.raises(ConfigError, match="no readings"):
        start([], INFOS)
    one = reading([0.0, 5, 1, 2, -3, 9], [1, 2, 3], [0.5, 0.2, -0.1])
    with pytest.raises(UnsupportedModelError, match="a#0 gives experts negative weights"):
        start([one], INFOS)
    with pytest.raises(ConfigError, match="do not fit"):
        start([one], (*INFOS, *INFOS))
