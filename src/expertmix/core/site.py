"""Where a decision is made: `Site`, and the patterns that name many of them.

A site is the name of a routed module and the step at which it ran. It knows nothing of models:
bindings make sites, everything else matches them by pattern.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from expertmix.errors import UnknownSiteError


@dataclass(frozen=True, order=True, slots=True)
class Site:
    """A routed module and the step at which it ran.

    Attributes:
        name: Qualified module name, such as `model.layers.7.mlp`.
        step: Iteration within one pass: 0 for a plain MoE layer, 0..C-1 for a Chain-of-Experts
            layer, the number of the call for an orchestrator.
    """

    name: str
    step: int = 0

    def __str__(self) -> str:
        return f"{self.name}#{self.step}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read `name` or `name#step`; the inverse of `str`."""
        name, mark, step = text.rpartition("#")
        return cls(name, int(step)) if mark and step.isdigit() else cls(text)

    def matches(self, pattern: str) -> bool:
        """Whether a glob names this site.

        A pattern with `#` is compared with `name#step`, one without matches every step. It may name
        the whole module path or any tail of it that starts at a dot: `layers.7.*` is enough.
        """
        text = str(self) if "#" in pattern else self.name
        return fnmatchcase(text, pattern) or fnmatchcase(text, f"*.{pattern}")


@dataclass(frozen=True, slots=True)
class SiteInfo:
    """What is known of a site before it runs.

    Attributes:
        site: The site.
        num_experts: E, how many experts its router can choose from.
        top_k: K, how many it chooses for a token.
        experts: Names of the E experts, where they have names.
    """

    site: Site
    num_experts: int
    top_k: int
    experts: tuple[str, ...] = ()

    def expert_name(self, index: int) -> str:
        """The expert's name, or its number where it has none."""
        return self.experts[index] if self.experts else str(index)


def match(pattern: str, sites: Iterable[Site]) -> tuple[Site, ...]:
    """All sites that a pattern names, in the model's order.

    Raises:
        UnknownSiteError: Nothing matches; the message lists the nearest names.
    """
    known = tuple(sites)
    found = tuple(site for site in known if site.matches(pattern))
    if not found:
        raise UnknownSiteError(
            f"no site matches {pattern!r}. Near names: {', '.join(_near(pattern, known))}. "
            f"The model has {len(known)} sites; em.sites(model) or `expertmix models` list them."
        )
    return found


def _near(pattern: str, sites: Sequence[Site], most: int = 4) -> list[str]:
    names = [str(site) if "#" in pattern else site.name for site in sites]
    return difflib.get_close_matches(pattern, names, n=most, cutoff=0.3) or names[:most]
