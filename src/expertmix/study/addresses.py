"""`SITE:EXPERT` as people type it, turned into interventions.

SITE is a pattern of site names; EXPERT is a number or a name, or several with commas between them.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from expertmix.core.intervention import Intervention
from expertmix.core.removal import Ablate, Mask
from expertmix.core.site import SiteInfo, match
from expertmix.errors import ConfigError, UnknownExpertError


def edits(
    sites: Sequence[SiteInfo], *, ablate: Sequence[str] = (), mask: Sequence[str] = ()
) -> tuple[Intervention, ...]:
    """Interventions for addresses, checked against the sites of a model.

    Args:
        sites: Of the model.
        ablate: Addresses of experts to drop after selection.
        mask: Addresses of experts to forbid before selection.

    Raises:
        ConfigError: Not of the form SITE:EXPERT.
        AddressError: No such site or expert.
        InterventionError: A mask leaves too few experts.
    """
    found: list[Intervention] = [Ablate(*parse(text, sites)) for text in ablate]
    found += [Mask(*parse(text, sites)) for text in mask]
    for edit in found:
        edit.targets(sites)
    return tuple(found)


def parse(text: str, sites: Sequence[SiteInfo]) -> tuple[str, tuple[int, ...]]:
    """The pattern and the expert numbers of `SITE:EXPERT`.

    Raises:
        ConfigError: Not of that form.
        UnknownSiteError: No site matches.
        UnknownExpertError: The sites have no expert of that name.
    """
    pattern, colon, experts = text.rpartition(":")
    if not (pattern and colon and experts.strip()):
        raise ConfigError(
            f"{text!r} is not SITE:EXPERT. Write a site or a pattern, a colon and an expert, such "
            f'as "*.layers.7.mlp:3" or "*:python"'
        )
    matched = match(pattern, [info.site for info in sites])
    infos = [info for info in sites if info.site in matched]
    return pattern, tuple(_number(name.strip(), infos) for name in experts.split(","))


def _number(expert: str, infos: Sequence[SiteInfo]) -> int:
    if expert.removeprefix("-").isdecimal():
        return int(expert)
    for info in infos:
        if expert not in info.experts:
            raise UnknownExpertError(_unknown(expert, info))
    numbers = {info.experts.index(expert) for info in infos}
    if len(numbers) > 1:
        raise UnknownExpertError(
            f"{expert!r} has different numbers at the sites of this pattern: address each site"
        )
    return numbers.pop()


def _unknown(expert: str, info: SiteInfo) -> str:
    if not info.experts:
        return (
            f"{info.site} has no expert named {expert!r}: its experts have numbers, "
            f"0 to {info.num_experts - 1}"
        )
    near = difflib.get_close_matches(expert, info.experts, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{info.site} has no expert named {expert!r}; it has {', '.join(info.experts)}.{hint}"
