from __future__ import annotations

import torch

from expertmix.attribute import usage
from expertmix.core.decision import Decision
from expertmix.core.site import Site, SiteInfo
from expertmix.core.tokens import Tokens
from expertmix.core.trace import Chunk, Memory, Trace, TraceMeta
from expertmix.study.service import service_table


def test_the_two_first_choices_of_each_text_are_named():
    """Pooled over sites; the own expert's share stands beside them."""
    infos = tuple(SiteInfo(Site(f"layers.{n}.mlp"), 3, 1, ("base", "a", "b")) for n in range(2))
    tokens = Tokens(
        sample=torch.tensor([0, 0, 1, 1]), position=torch.tensor([0, 1, 0, 1]),
        token_id=torch.zeros(4, dtype=torch.int64), real=torch.ones(4, dtype=torch.bool),
    )  # fmt: skip
    first, second = (torch.tensor(experts)[:, None] for experts in ([1, 1, 0, 2], [1, 2, 0, 0]))
    decisions = {
        info.site: Decision(experts, torch.ones(4, 1), 3)
        for info, experts in zip(infos, (first, second), strict=True)
    }
    chunk = Chunk(tokens, decisions, {0: "a", 1: "b"})
    table = service_table(usage(Trace(TraceMeta("x", "m", infos), Memory([chunk]))))
    rows = [[str(cell).replace("\u202f", " ") for cell in row] for row in table.rows]
    assert rows[0] == ["a", "a", "75 %", "b", "25 %", "75 %"]
    assert rows[1] == ["b", "base", "75 %", "b", "25 %", "25 %"]
    assert table.headline.startswith("1 of 2 kinds")
