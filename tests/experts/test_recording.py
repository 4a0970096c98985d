"""What lives on the core works at adapters: record, ablate, mask, reweight, replay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from expertmix.core.intervention import Intervention
from expertmix.core.record import record
from expertmix.core.removal import Ablate, Mask
from expertmix.core.replay import Replay
from expertmix.core.reweight import Reweight
from expertmix.core.trace import Trace
from expertmix.errors import InterventionError, UnknownExpertError, UnknownSiteError
from expertmix.experts.composed import Composed
from expertmix.experts.peft_folder import read_library
from expertmix.experts.shelf import Shelf
from expertmix.routers.fixed import Fixed
from expertmix.routers.oracle import Oracle
from expertmix.routers.spectr import SpectR

from .world import (
    IDS,
    close,
    deltas,
    double,
    naive,
    peft_adapter,
    projection_score,
    random_adapter,
    tiny_llama,
    top_weights,
)

SITE = "model.layers.1.mlp.up_proj"
SOFT = SpectR(top_k=2, weights="softmax", temperature=4.0)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five adapters on some modules, of two ranks."""
    root = tmp_path_factory.mktemp("adapters")
    for seed in range(5):
        targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
        peft_adapter(root / f"a{seed}", seed, r=2 + 2 * (seed % 2), target_modules=targets)
    return root


@pytest.fixture
def composed(adapters: Path) -> Iterator[Composed]:
    with Composed(tiny_llama(), Shelf.open(adapters), SOFT) as made:
        yield made


@torch.no_grad()
def logits_of(composed: Composed, *edits: Intervention, ids=IDS, **inputs):
    with record(composed, *edits):
        return composed.model(ids, **inputs).logits


@torch.no_grad()
def traced(composed: Composed, *edits: Intervention, ids=IDS, options=None, **inputs) -> Trace:
    with record(composed, *edits, **(options or {})) as trace:
        composed.model(ids, **inputs)
    return trace


# --- record -------------------------------------------------------------------------------------


def test_recording_changes_no_bit(composed):
    """The logits are the same with and without a recording, and no hook is left."""
    with torch.no_grad():
        plain = composed.model(IDS).logits
    hooks = [len(module._forward_hooks) for module in composed.model.modules()]
    assert torch.equal(logits_of(composed), plain)
    assert [len(module._forward_hooks) for module in composed.model.modules()] == hooks
    with pytest.raises(ZeroDivisionError), record(composed):
        _ = 1 / 0
    assert [len(module._forward_hooks) for module in composed.model.modules()] == hooks
    with torch.no_grad():
        assert torch.equal(composed.model(IDS).logits, plain)


def test_a_trace_names_tokens_sites_and_adapters(composed, tmp_path: Path):
    """Every adapted module is a site, in the order of the model; it survives its file."""
    trace = traced(composed, options={"logits": True})
    assert [site.name for site in trace.sites] == [
        f"model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    assert trace.info(trace.sites[0]).experts == ("a0", "a1", "a2", "a3", "a4")
    assert torch.equal(trace.tokens.token_id, IDS.flatten())
    assert trace[SITE].indices.shape == (18, 2)
    close(trace[SITE].weights.sum(1), torch.ones(18))
    close(trace[SITE].logits.topk(2).indices, trace[SITE].indices)
    again = Trace.load(trace.save(tmp_path / "trace.parquet"))
    assert again[SITE].equal(trace[SITE])
    assert again.meta.settings["router"] == repr(SOFT)


def test_prefill_and_cached_decoding_route_alike(composed):
    """The decisions of generate are those of one pass over the finished text."""
    with record(composed) as stepped:
        out = composed.model.generate(
            IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False,
            attention_mask=torch.ones_like(IDS),
        )  # fmt: skip
    whole = traced(composed, ids=out[:, :-1])
    for site in whole.sites:
        for row in range(2):
            one = stepped[site].rows(stepped.tokens.sample == row)
            two = whole[site].rows(whole.tokens.sample == row)
            assert torch.equal(one.indices, two.indices)
            close(one.weights, two.weights)


def test_padding_has_no_position(composed):
    """A padded row gets the decisions it gets alone; padding is told apart."""
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.int64), IDS[:1, :6]], 1)
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = traced(composed, ids=ids, attention_mask=mask, position_ids=positions)
    alone = traced(composed, ids=IDS[:1, :6])
    assert batch.tokens.position.tolist() == [-1] * 3 + list(range(6))
    assert torch.equal(batch[SITE].rows(batch.tokens.real).indices, alone[SITE].indices)


def test_recordings_nest(composed):
    """Two recordings at once see the same decisions, the inner one's edits included."""
    with torch.no_grad(), record(composed) as outer:
        with record(composed, Ablate(SITE, experts=(0, 1))) as inner:
            composed.model(IDS)
        composed.model(IDS)
    assert len(outer) == 2 * len(inner)
    assert outer[SITE].rows(torch.arange(18)).equal(inner[SITE])
    assert outer[SITE].rows(torch.arange(18, 36)).equal(traced(composed)[SITE])


# --- brute force --------------------------------------------------------------------------------


def brute_force(root: Path, weigh_at_site) -> torch.Tensor:
    """Logits of the naive float64 loop, with the weights at SITE as a function of scores says."""
    adapters, model = double(list(read_library(root))), tiny_llama(dtype=torch.float64)

    def weigh(module, flat):
        updates = deltas(adapters, module)
        rows = []
        for token, x in enumerate(flat):
            scores = [projection_score(x, update) for update in updates]
            rule = weigh_at_site if module == SITE else (lambda _, s: top(s))
            rows.append(rule(token, scores))
        return torch.stack(rows)

    with naive(model, adapters, weigh), torch.no_grad():
        return model(IDS).logits


def top(scores: list[float]) -> torch.Tensor:
    return top_weights(scores, 2, "softmax", 4.0)


def without(scores: list[float], experts: tuple[int, ...]) -> list[float]:
    return [float("-inf") if i in experts else score for i, score in enumerate(scores)]


def ablated(_, scores):
    return top(scores) * torch.tensor([0.0, 0, 1, 1, 1], dtype=torch.float64)


def masked(_, scores):
    return top(without(scores, (0, 1)))


def favored(_, scores):
    return top([score + 3.0 * (expert == 4) for expert, score in enumerate(scores)])


def shared(_, scores):
    shares = torch.softmax(torch.tensor(scores, dtype=torch.float64) / 4.0, 0)
    shares = shares * torch.tensor([0.0, 1, 5, 1, 1])
    order = shares.argsort(descending=True)[:2]
    kept = torch.zeros_like(shares)
    kept[order] = shares[order] / shares[order].sum()
    return kept


def given(_, scores):
    return torch.tensor([0.1, 0.0, 0.2, 0.0, 0.3], dtype=torch.float64)


def scaled(_, scores):
    return 0.5 * top(scores)


def last_only(token, scores):
    return given(token, scores) if token == 17 else top(scores)


@pytest.mark.parametrize(
    ("edit", "rule"),
    [
        (Ablate(SITE, experts=(0, 1)), ablated),
        (Mask(SITE, experts=(0, 1)), masked),
        (Reweight(SITE, torch.tensor([3.0]), stage="logits", mode="add", experts=(4,)), favored),
        (
            Reweight(
                SITE, torch.tensor([0.0, 1, 5, 1, 1]), stage="probabilities", mode="scale"
            ),
            shared,
        ),
        (Reweight(SITE, torch.tensor([0.1, 0, 0.2, 0, 0.3]), stage="weights"), given),
        (Reweight(SITE, torch.full((5,), 0.5), stage="weights", mode="scale"), scaled),
        (
            Reweight(
                SITE, torch.tensor([0.1, 0, 0.2, 0, 0.3]), stage="weights", samples=(1,),
                positions=(-1,),
            ),
            last_only,
        ),
    ],
    ids=["ablate", "mask", "logits", "probabilities", "weights", "scale", "one-token"],
)  # fmt: skip
def test_edits_do_what_brute_force_does(composed, adapters: Path, edit, rule):
    """Each intervention equals the naive loop with the same edit written by hand."""
    torch.testing.assert_close(
        logits_of(composed, edit).double(), brute_force(adapters, rule), rtol=1e-3, atol=1e-3
    )


def test_the_brute_force_is_right_without_edits(composed, adapters: Path):
    """The reference of these tests is the model itself where nothing is edited."""
    expected = brute_force(adapters, lambda _, scores: top(scores))
    torch.testing.assert_close(logits_of(composed).double(), expected, rtol=1e-3, atol=1e-3)


# --- replay -------------------------------------------------------------------------------------


def test_replay_is_bit_for_bit(composed, tmp_path: Path):
    """A trace replayed, from memory or from its file, gives the same logits and decisions."""
    plain = logits_of(composed)
    trace = traced(composed)
    stored = Trace.load(trace.save(tmp_path / "trace.parquet"))
    for source in (trace, stored):
        assert torch.equal(logits_of(composed, Replay(source)), plain)
        assert traced(composed, Replay(source))[SITE].equal(trace[SITE])


def test_a_trace_of_one_router_replays_under_another(adapters: Path):
    """What the oracle decided can be forced on SpectR: same base, same adapters."""
    shelf = Shelf.open(adapters)
    with Composed(tiny_llama(), shelf, Oracle(("a3", "a1"))) as told:
        expected, trace = logits_of(told), traced(told)
    with Composed(tiny_llama(), shelf, SOFT) as composed:
        close(logits_of(composed, Replay(trace)), expected)


def test_ablating_everybody_is_the_base(composed):
    """Without any adapter the logits are the base's."""
    with torch.no_grad():
        close(logits_of(composed, Ablate("*", experts=range(5))), tiny_llama()(IDS).logits)


def test_setting_one_adapter_is_fixed(composed, adapters: Path):
    """Reweight to one adapter at every site equals the router that is fixed to it."""
    with Composed(tiny_llama(), Shelf.open(adapters), Fixed("a2")) as fixed:
        expected = logits_of(fixed)
    one = Reweight("*", torch.eye(5)[2], stage="weights")
    close(logits_of(composed, one), expected)


# --- gradients ----------------------------------------------------------------------------------


def fine_norms(model):
    """Llama's norms compute in float32, which is too coarse for finite differences."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(32, eps=1e-6, dtype=torch.float64)
                setattr(module, name, norm)
    return model


@pytest.mark.parametrize("stage", ["logits", "probabilities", "weights"])
@pytest.mark.parametrize("count", [5, 40])
def test_values_get_right_gradients(adapters: Path, stage, count):
    """Gradients of Reweight values equal finite differences; few adapters (dense) and many."""
    crowd = double(list(read_library(adapters)))
    crowd += [random_adapter(f"more{i}", i, [SITE], scale=0.1) for i in range(count - 5)]
    values = torch.linspace(0.2, 0.5, count, dtype=torch.float64)

    model = fine_norms(tiny_llama(dtype=torch.float64))
    with Composed(model, Shelf.of(crowd), SOFT) as composed:

        def loss(values):
            edit = Reweight(SITE, values, stage=stage, mode="scale")
            with record(composed, edit):
                return composed.model(IDS).logits.square().mean()

        leaf = values.clone().requires_grad_()
        loss(leaf).backward()
        direction = torch.linspace(-1, 1, count, dtype=torch.float64).sin()
        with torch.no_grad():
            numeric = (loss(values + 1e-6 * direction) - loss(values - 1e-6 * direction)) / 2e-6
    assert leaf.grad.abs().sum() > 0
    torch.testing.assert_close((leaf.grad * direction).sum(), numeric, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("router", [SOFT, SpectR(top_k=2), Fixed("a1")])
def test_weights_have_gradients(adapters: Path, router):
    """With grad=True every recorded weight has its gradient, for every kind of weights."""
    with Composed(tiny_llama(), Shelf.open(adapters), router) as composed:
        with record(composed, grad=True) as trace:
            loss = composed.model(IDS, labels=IDS).loss
        loss.backward()
        for site in trace.sites:
            assert trace[site].weights.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_interventions_survive_gradient_checkpointing(composed):
    """A recomputed block gets the same edits: the same gradient as without checkpointing."""
    grads = []
    for checkpointing in (False, True):
        composed.model.train()
        if checkpointing:
            composed.model.gradient_checkpointing_enable({"use_reentrant": False})
        values = torch.full((5,), 0.3, requires_grad=True)
        with record(composed, Reweight(SITE, values, stage="weights", mode="scale")):
            composed.model(IDS, use_cache=False).logits.square().mean().backward()
        grads.append(values.grad)
    close(*grads)


# --- what cannot be -----------------------------------------------------------------------------


def test_impossible_edits_are_typed_errors(composed):
    """Unknown sites and adapters, and masks that leave too few, are told."""
    for edit, error in (
        (Ablate("*.lm_head", experts=(0,)), UnknownSiteError),
        (Ablate(SITE, experts=(5,)), UnknownExpertError),
        (Mask(SITE, experts=(0, 1, 2, 3)), InterventionError),
    ):
        with pytest.raises(error):
            logits_of(composed, edit)
    together = (Mask(SITE, experts=(0, 1)), Mask(SITE, experts=(2, 3)))
    with pytest.raises(InterventionError, match="1 experts"):
        logits_of(composed, *together)
    sunk = torch.full((4,), float("-inf"))
    with pytest.raises(InterventionError, match="1 adapters"):
        logits_of(composed, Reweight(SITE, sunk, stage="logits", experts=(0, 1, 2, 3)))
    logits_of(composed)


def test_a_mask_that_leaves_only_idle_adapters_is_an_error(library: Path):
    """Adapters that do nothing at a site cannot step in for masked ones."""
    site = "model.layers.0.mlp.up_proj"  # ada and cyd; bob, dee and eve do nothing there
    with (
        Composed(tiny_llama(), Shelf.open(library), SpectR(top_k=2)) as composed,
        pytest.raises(InterventionError, match=r"1 adapters at model.layers.0.mlp.up_proj"),
    ):
        logits_of(composed, Mask(site, experts=(0,)))


@pytest.mark.parametrize("stage", ["logits", "probabilities"])
def test_no_edit_makes_an_idle_adapter_chosen(library: Path, stage):
    """However high its score is set before top-k, an adapter that does nothing is not chosen."""
    site = "model.layers.0.mlp.up_proj"
    lift = Reweight(site, torch.tensor([99.0, 99.0]), stage=stage, experts=(1, 4))
    with Composed(tiny_llama(), Shelf.open(library), SpectR(top_k=1)) as composed:
        assert torch.equal(traced(composed, lift)[site].indices, traced(composed)[site].indices)


def test_hidden_states_that_are_no_numbers_are_not_blamed_on_a_mask(composed):
    """Where a token (padding, say) is NaN, a mask that leaves enough adapters raises nothing."""
    embeds = composed.model.get_input_embeddings()(IDS).detach()
    embeds[1, -1] = float("nan")
    with torch.no_grad(), record(composed, Mask(SITE, experts=(0,))) as trace:
        logits = composed.model(inputs_embeds=embeds).logits
    assert not (trace[SITE].indices[:-1] == 0).any()
    assert torch.isfinite(logits[0]).all()
