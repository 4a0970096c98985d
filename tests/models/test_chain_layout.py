from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmix.errors import CheckpointError
from expertmix.models.chain_layout import Layout, is_scale, iteration_of

_AT = "model.layers.3"
_GATE_UP = f"{_AT}.mlp.experts.gate_up_proj"
_APART = Layout("block_sparse_moe", ("w1", "w3", "w2"), "shared_expert")


@given(experts=st.integers(1, 9), half=st.integers(1, 9), hidden=st.integers(1, 9))
def test_parts_tile_the_whole(experts: int, half: int, hidden: int) -> None:
    """Every row of every expert has exactly one part."""
    for kind, rows in (("gate_up_proj", 2 * half), ("down_proj", half)):
        shape = (experts, rows, hidden)
        parts = _APART.parts(f"{_AT}.mlp.experts.{kind}", shape)
        covered = [(part.expert, row) for part in parts for row in range(*part.rows)]
        assert sorted(covered) == [(e, row) for e in range(experts) for row in range(rows)]
        assert len({part.name for part in parts}) == len(parts)
        assert all(part.shape(shape)[1] == hidden for part in parts)


def test_names_are_those_of_the_layout() -> None:
    """Of Mixtral on disk, and of transformers in memory."""
    apart = [part.name for part in _APART.parts(_GATE_UP, (1, 4, 3))]
    inside = f"{_AT}.block_sparse_moe.experts.0"
    assert apart == [f"{inside}.w1.weight", f"{inside}.w3.weight"]
    fused = Layout("mlp", None, "shared_experts")
    assert [part.name for part in fused.parts(_GATE_UP, (1, 4, 3))] == [_GATE_UP]


def test_a_layout_is_seen_by_names_and_survives_json() -> None:
    """There and back."""
    for names, layout in (
        ([f"{_AT}.block_sparse_moe.experts.0.w1.weight"], _APART),
        ([_GATE_UP, f"{_AT}.mlp.shared_experts.x"], Layout("mlp", None, "shared_experts")),
    ):
        assert Layout.of(names) == layout
        assert Layout.from_json(layout.to_json()) == layout
    with pytest.raises(CheckpointError, match="no tensors of experts"):
        Layout.of(["model.norm.weight"])


def test_iterations_share_their_origin() -> None:
    """A later norm is made of what the first is made of; a scale, of nothing."""
    at = f"{_AT}.mlp.iterations"
    assert _APART.parts(f"{at}.2.norm.weight", (3,)) == _APART.parts(f"{at}.0.norm.weight", (3,))
    assert _APART.parts(f"{at}.2.scale", ()) == []
    assert (iteration_of(f"{at}.2.scale"), iteration_of(_GATE_UP)) == (2, 0)
    assert is_scale(f"{at}.2.scale")
    assert not is_scale(f"{at}.2.gate.weight")
