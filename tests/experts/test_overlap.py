from __future__ import annotations

import pytest
import torch

from expertmix.errors import CheckpointError
from expertmix.experts import overlap as overlap_file
from expertmix.experts.lora import Adapter, Factors
from expertmix.experts.overlap import Overlap
from expertmix.experts.shelf import Shelf

from .world import deltas, random_adapter, zero

MODULES = ["x", "y", "z"]


@pytest.fixture
def adapters() -> list[Adapter]:
    """Mixed ranks and modules; one that does nothing."""
    return [
        random_adapter("a", 1, ["x", "y"]), random_adapter("b", 2, ["y", "z"], rank=2),
        random_adapter("c", 3, MODULES, rank=7), random_adapter("d", 4, ["x"], rank=1),
        zero(random_adapter("e", 5, ["x"])),
    ]  # fmt: skip


def loop(adapters: list[Adapter]) -> dict[str, torch.Tensor]:
    """From the updates themselves, in float64, pair by pair and module by module."""
    count = len(adapters)
    found = {name: torch.full((count, count), torch.nan).double() for name in ("reads", "updates")}
    found["common"] = torch.zeros(count, count).long()
    for i in range(count):
        for j in range(count):
            reads, updates = [], []
            for module in MODULES:
                one, other = (deltas(adapters, module)[number] for number in (i, j))
                if not one.any() or not other.any():
                    continue
                updates.append((one * other).sum() / one.norm() / other.norm())
                spaces = [_space(delta) for delta in (one, other)]
                smaller = min(len(space) for space in spaces)
                reads.append((spaces[0] @ spaces[1].T).square().sum() / smaller)
            found["common"][i, j] = len(reads)
            if reads:
                found["reads"][i, j] = torch.stack(reads).mean()
                found["updates"][i, j] = torch.stack(updates).mean()
    return found


def _space(delta: torch.Tensor) -> torch.Tensor:
    _, singular, right = torch.linalg.svd(delta, full_matrices=False)
    return right[singular > 1e-9 * singular[0]]


@pytest.mark.parametrize("block", [1, 8, 2048])
def test_it_is_what_a_loop_over_pairs_finds(adapters, monkeypatch, block):
    """Both overlaps equal those of full SVDs of the updates, however many rows go at a time."""
    monkeypatch.setattr(overlap_file, "_BLOCK", block)
    found, expected = Overlap.of(Shelf.of(adapters)), loop(adapters)
    for name, table in expected.items():
        torch.testing.assert_close(
            getattr(found, name), table, rtol=1e-4, atol=1e-5, equal_nan=True
        )


def test_an_adapter_is_like_itself_and_only_as_large_as_it_is(adapters):
    """One on the diagonal; a scaled copy has a cosine of 1, its negative of -1; both read alike."""
    one = adapters[0]
    copies = [
        Adapter(name, {m: Factors(f.down, f.up, factor * f.scale) for m, f in one.factors.items()})
        for name, factor in (("larger", 3.0), ("against", -1.0))
    ]
    found = Overlap.of(Shelf.of([one, *copies]))
    torch.testing.assert_close(found.reads, torch.ones(3, 3).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.updates[0], torch.tensor([1.0, 1.0, -1.0]).double())


def test_chance_is_what_random_spaces_share():
    """Over many random pairs the mean overlap is max(r_i, r_j) / n."""
    shelf = Shelf.of(
        [random_adapter(str(seed), seed, rank=2 + 4 * (seed % 2)) for seed in range(60)]
    )
    found = Overlap.of(shelf)
    pairs = torch.ones(60, 60).triu(1) > 0
    assert found.chance[0, 2] == 2 / 32
    assert found.chance[0, 1] == found.chance[1, 3] == 6 / 32
    mean, expected = found.reads[pairs].mean(), found.chance[pairs].mean()
    torch.testing.assert_close(mean, expected, rtol=0.03, atol=0)
    assert abs(float(found.updates[pairs].mean())) < 0.01


def test_near_duplicates_are_found(adapters):
    """A copy with a little noise is listed, with both names and both numbers; others are not."""
    generator = torch.Generator().manual_seed(9)
    one = adapters[2]
    noisy = {
        module: Factors(
            f.down + 0.01 * torch.randn(f.down.shape, generator=generator), f.up, 2 * f.scale
        )
        for module, f in one.factors.items()
    }
    found = Overlap.of(Shelf.of([*adapters, Adapter("copy", noisy)]))
    (pair,) = found.duplicates()
    assert (pair.first, pair.second) == ("c", "copy")
    assert 0.99 < pair.updates < 1
    assert pair.reads > 0.99
    assert found.duplicates(pair.updates) == ()
    assert found.nearest(2) == 5


def test_the_nearest_is_another_one(adapters):
    """Never itself; none where no other adapter shares a module."""
    found = Overlap.of(Shelf.of(adapters))
    expected = loop(adapters)["updates"].nan_to_num(-9).fill_diagonal_(-9).argmax(1).tolist()
    assert [found.nearest(number) for number in range(4)] == expected[:4]
    assert found.nearest(4) is None
    assert Overlap.of(Shelf.of(adapters[:1])).nearest(0) is None


def test_some_modules_may_do(adapters):
    """Only the modules that are named count."""
    found = Overlap.of(Shelf.of(adapters), ["y"])
    assert found.common[0, 2] == 1
    assert found.common[0, 3] == 0
    alone = [Adapter(a.name, {"y": a.factors["y"]}) for a in adapters if "y" in a.factors]
    torch.testing.assert_close(found.updates[:3, :3], Overlap.of(Shelf.of(alone)).updates)


def test_adapters_of_two_bases_are_told():
    """Weights of two shapes at one module cannot be compared: both adapters are named."""
    shelf = Shelf.of([random_adapter("a", 1, ["x"]), random_adapter("b", 2, ["x"], shape=(9, 8))])
    with pytest.raises(CheckpointError, match=r"'a' and 'b'.*'x'.*\(48, 32\).*\(9, 8\)"):
        Overlap.of(shelf)
