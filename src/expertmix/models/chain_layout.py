"""How checkpoints of MoE families name the tensors of which a chain's are made.

Knows names, and which part of a chain's tensor each one is; no file, no number. The families differ
in three ways: what a routed block is called, whether experts are stored one by one or fused, and
what the shared experts are called. Everything else has one name everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from expertmix.errors import CheckpointError
from expertmix.models.shards import Shape

_BLOCKS = ("block_sparse_moe", "mlp")
_APART = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))
_SHARED = ("shared_expert", "shared_experts")
_OWN = re.compile(r"^(model\.layers\.\d+)\.mlp\.(iterations|experts|shared_experts?\w*)\.(.+)$")
_ITERATION = re.compile(r"\.mlp\.iterations\.(\d+)\.(\w+)")


class Part(NamedTuple):
    """A tensor of a MoE, and which part it is of a chain's tensor.

    Attributes:
        name: Of the MoE's tensor.
        expert: Its place in the first dimension, or None where it is the whole tensor.
        rows: From where to where in the second.
    """

    name: str
    expert: int | None = None
    rows: tuple[int, int] = (0, 0)

    def shape(self, whole: Shape) -> Shape:
        """Its shape, given that of the chain's tensor."""
        return whole if self.expert is None else (self.rows[1] - self.rows[0], *whole[2:])

    def places(self) -> tuple[slice, ...]:
        """Where it is in the chain's tensor."""
        if self.expert is None:
            return ()
        return slice(self.expert, self.expert + 1), slice(*self.rows)


@dataclass(frozen=True)
class Layout:
    """Names of a MoE's tensors.

    Attributes:
        block: What a routed block is called: `mlp`, or Mixtral's `block_sparse_moe`.
        apart: Names of an expert's gate, up and down projection where experts are stored one by
            one; None where all of a layer are one tensor, as in transformers' memory.
        shared: What shared experts are called.
    """

    block: str
    apart: tuple[str, str, str] | None
    shared: str

    @classmethod
    def of(cls, names: Collection[str]) -> Layout:
        """The layout of a checkpoint, seen by its names.

        Raises:
            CheckpointError: No experts in it.
        """
        shared = next((s for s in _SHARED if any(f".mlp.{s}." in n for n in names)), _SHARED[0])
        for block in _BLOCKS:
            inside = [name for name in names if f".{block}.experts." in name]
            for apart in _APART:
                if any(name.endswith(f".{apart[0]}.weight") for name in inside):
                    return cls(block, apart, shared)
            if inside:
                return cls(block, None, shared)
        raise CheckpointError("it holds no tensors of experts")

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> Layout:
        """What `to_json` gave."""
        apart = written["apart"]
        return cls(written["block"], tuple(apart) if apart else None, written["shared"])

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"block": self.block, "apart": self.apart, "shared": self.shared}

    def parts(self, name: str, shape: Shape) -> list[Part]:
        """The MoE's tensors of which a chain's tensor is made; none where there is no such.

        Args:
            name: Of the chain's tensor. Of norms and routers, those of later iterations have the
                parts that the first one's have.
            shape: Its shape.
        """
        match = _OWN.match(name)
        if match is None:
            return [Part(name)]
        layer, kind, rest = match.groups()
        if kind == "experts":
            return self._experts(f"{layer}.{self.block}.experts", rest, shape)
        if kind == "shared_experts":
            return [Part(f"{layer}.{self.block}.{self.shared}.{rest}")]
        if kind == "shared_expert_gate":
            return [Part(f"{layer}.{self.block}.{kind}.{rest}")]
        own = {
            "norm.weight": f"{layer}.post_attention_layernorm.weight",
            "gate.weight": f"{layer}.{self.block}.gate.weight",
        }
        inner = rest.partition(".")[2]
        return [Part(own[inner])] if inner in own else []

    def _experts(self, at: str, rest: str, shape: Shape) -> list[Part]:
        if self.apart is None:
            return [Part(f"{at}.{rest}")]
        gate, up, down = self.apart
        count, rows = shape[0], shape[1]
        if rest == "down_proj":
            return [Part(f"{at}.{e}.{down}.weight", e, (0, rows)) for e in range(count)]
        half = rows // 2
        return [
            part
            for e in range(count)
            for part in (
                Part(f"{at}.{e}.{gate}.weight", e, (0, half)),
                Part(f"{at}.{e}.{up}.weight", e, (half, rows)),
            )
        ]


def iteration_of(name: str) -> int:
    """Of which iteration a chain's tensor is; 0 for all that the first one needs."""
    match = _ITERATION.search(name)
    return int(match[1]) if match else 0


def is_scale(name: str) -> bool:
    """Whether a chain's tensor is the scale of an iteration."""
    match = _ITERATION.search(name)
    return match is not None and match[2] == "scale"
