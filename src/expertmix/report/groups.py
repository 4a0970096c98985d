"""Which sites can be looked at together: `Group`, the sites with the same experts.

Expert 3 of one layer has nothing to do with expert 3 of another unless the experts have names. So
only named experts are ever pooled over sites.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from expertmix.attribute.tally import SiteUsage, Tally, pool
from expertmix.report import words


@dataclass(frozen=True, eq=False)
class Group:
    """Sites with the same number of experts and the same names.

    Attributes:
        sites: At least one; in the model's order.
        experts: E display names.
        named: The names are the model's; otherwise they are numbers.
        noun: What one of them is called: `expert` or `adapter`.
    """

    sites: tuple[SiteUsage, ...]
    experts: tuple[str, ...]
    named: bool
    noun: str = "expert"

    @property
    def comparable(self) -> bool:
        """Expert i means the same at every site."""
        return self.named or len(self.sites) == 1

    @property
    def view(self) -> tuple[SiteUsage, ...]:
        """Sites that a table of label × expert is made of: all, or the most specialized one."""
        return self.sites if self.comparable else (self.most_specialized,)

    @property
    def most_specialized(self) -> SiteUsage:
        """The site where labels differ most in the experts that they call; without labels, any."""
        known = [site for site in self.sites if not math.isnan(site.specialization)]
        if not known:
            return self.sites[len(self.sites) // 2]
        return max(known, key=lambda site: site.specialization)

    @property
    def fair_share(self) -> float:
        """Frequency of every expert if the router were even: K / E."""
        return self.sites[0].info.top_k / len(self.experts)

    def tally(self, label: str | None = None) -> Tally:
        """What the view says of a label."""
        return pool(self.view, label)

    def expert(self, number: int) -> str:
        """An expert in a sentence."""
        return words.named(self.experts[number]) if self.named else f"{self.noun} {number}"


def grouped(sites: Sequence[SiteUsage], noun: str = "expert") -> tuple[Group, ...]:
    """Groups in order of their first sites; sites that never ran are left out."""
    found: dict[tuple[int, tuple[str, ...]], list[SiteUsage]] = {}
    for site in sites:
        if site.total.tokens:
            found.setdefault((site.info.num_experts, site.info.experts), []).append(site)
    return tuple(
        Group(
            tuple(members),
            names or tuple(str(number) for number in range(experts)),
            bool(names),
            noun,
        )
        for (experts, names), members in found.items()
    )


def group_title(group: Group) -> str:
    """How a group is told from the others."""
    return f"{words.counted(len(group.experts), group.noun)} per site"
