"""Which columns a trace file has, and the metadata that says so.

One row per token. Sites whose decisions have the same shape share a *group*, and a group is two or
three fixed-size list columns: `experts` (S*K numbers), `weights` (S*K) and, where recorded,
`logits` (S*E), site after site in the group's order. A usual model has one group; with several the
columns are `experts_1`, `experts_2`, … Metadata is JSON under the key `expertmix` of the schema.

This file opens no files. Legend: S sites of a group, K selected experts, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import pyarrow as pa

from expertmix.core.site import Site, SiteInfo
from expertmix.core.trace import SCHEMA_VERSION, Chunk, TraceMeta
from expertmix.errors import ConfigError, TraceError

KEY = b"expertmix"
MOST_EXPERTS = 32767  # expert numbers are int16
PRECISIONS = ("float32", "float16")


class Shape(NamedTuple):
    """What a site's decisions need room for: E, K, and whether there are logits."""

    num_experts: int
    top_k: int
    logits: bool


@dataclass(frozen=True)
class Group:
    """Sites that share columns.

    Attributes:
        sites: The S sites, in the order of their slots in a row.
        shape: Their common shape.
        suffix: What their column names end with.
    """

    sites: tuple[Site, ...]
    shape: Shape
    suffix: str

    @property
    def experts(self) -> str:
        """Column of S*K expert numbers."""
        return f"experts{self.suffix}"

    @property
    def weights(self) -> str:
        """Column of S*K weights."""
        return f"weights{self.suffix}"

    @property
    def logits(self) -> str | None:
        """Column of S*E logits, if there is one."""
        return f"logits{self.suffix}" if self.shape.logits else None

    @property
    def columns(self) -> tuple[str, ...]:
        """All of its columns."""
        names = (self.experts, self.weights, self.logits)
        return tuple(name for name in names if name is not None)

    def field_of(self, name: str) -> Any:
        """The Arrow field of one of its columns."""
        value = pa.int16() if name == self.experts else pa.float32()
        width = self.shape.num_experts if name == self.logits else self.shape.top_k
        return pa.field(name, pa.list_(value, len(self.sites) * width))


@dataclass(frozen=True)
class Layout:
    """The columns of one trace file.

    Attributes:
        shapes: Shape by site, in the model's order.
        precision: What weights and logits are rounded to: `float32` or `float16`.
        token_ids: There is a column `token_id`.
        labels: There is a column `label`.
        text: There is a column `token`.
    """

    shapes: Mapping[Site, Shape]
    precision: str = "float32"
    token_ids: bool = True
    labels: bool = False
    text: bool = False

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Sites by shape, in the order of their first sites."""
        members: dict[Shape, list[Site]] = {}
        for site, shape in self.shapes.items():
            members.setdefault(shape, []).append(site)
        many = len(members) > 1
        return tuple(
            Group(tuple(sites), shape, f"_{number}" if many else "")
            for number, (shape, sites) in enumerate(members.items(), 1)
        )

    @property
    def token_columns(self) -> tuple[str, ...]:
        """The columns that say for whom, not what."""
        optional = {"token_id": self.token_ids, "label": self.labels, "token": self.text}
        names = ("sample", "position", "token_id", "real", "label", "token")
        return tuple(name for name in names if optional.get(name, True))

    def groups_of(self, sites: Iterable[Site]) -> tuple[Group, ...]:
        """The groups that hold any of these sites."""
        wanted = frozenset(sites)
        return tuple(group for group in self.groups if not wanted.isdisjoint(group.sites))

    def fitted(self, chunk: Chunk, *, text: bool) -> Layout:
        """The same layout if the chunk fits in it, otherwise the next larger one."""
        wider = {
            site: Shape(
                old.num_experts,
                max(old.top_k, decision.top_k),
                old.logits or decision.logits is not None,
            )
            for site, decision in chunk.decisions.items()
            if (old := self.shapes.get(site)) is not None
        }
        labels = self.labels or bool(chunk.labels)
        text = self.text or (text and chunk.text is not None)
        shapes = {**self.shapes, **wider}
        if (shapes, labels, text) == (self.shapes, self.labels, self.text):
            return self
        return replace(self, shapes=shapes, labels=labels, text=text)

    def schema(self, meta: TraceMeta) -> Any:
        """The Arrow schema, metadata included."""
        fields = [pa.field(name, _TOKEN_TYPES[name]) for name in self.token_columns]
        fields += [group.field_of(name) for group in self.groups for name in group.columns]
        return pa.schema(fields, metadata={KEY: json.dumps(_described(meta, self)).encode()})

    def encodings(self) -> dict[str, str]:
        """Encoding by column path: what made the file small at OLMoE's shape (see `parquet`)."""
        lists = {
            f"{name}.list.element": "BYTE_STREAM_SPLIT"
            for group in self.groups
            for name in group.columns
        }
        return {"sample": "DELTA_BINARY_PACKED", "position": "DELTA_BINARY_PACKED", **lists}


_TOKEN_TYPES = {
    "sample": pa.int32(),
    "position": pa.int32(),
    "token_id": pa.int32(),
    "real": pa.bool_(),
    "label": pa.dictionary(pa.int32(), pa.string()),
    "token": pa.string(),
}


def first_layout(sites: Iterable[SiteInfo], precision: str, *, token_ids: bool) -> Layout:
    """The layout before anything was recorded.

    Raises:
        ConfigError: No such precision.
        TraceError: A site has more experts than int16 can number.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"weights={precision!r}: a trace keeps {' or '.join(PRECISIONS)}")
    shapes = {info.site: Shape(info.num_experts, info.top_k, False) for info in sites}
    for site, shape in shapes.items():
        if shape.num_experts > MOST_EXPERTS:
            raise TraceError(
                f"{site} has {shape.num_experts} experts; a trace file numbers at most "
                f"{MOST_EXPERTS} (int16). Keep this trace in memory."
            )
    return Layout(shapes, precision, token_ids)


def _described(meta: TraceMeta, layout: Layout) -> dict[str, Any]:
    sites = [
        {"name": info.site.name, "step": info.site.step, "num_experts": info.num_experts,
         "top_k": info.top_k, "experts": info.experts}
        for info in meta.sites
    ]  # fmt: skip
    groups = [
        {"columns": group.columns, "sites": [asdict(site) for site in group.sites],
         **group.shape._asdict()}
        for group in layout.groups
    ]  # fmt: skip
    return {
        "schema": SCHEMA_VERSION,
        "fingerprint": meta.fingerprint,
        "model": meta.model,
        "created": meta.created,
        "settings": meta.settings,
        "versions": meta.versions,
        "interventions": meta.interventions,
        "sites": sites,
        "layout": {
            "precision": layout.precision, "token_ids": layout.token_ids, "labels": layout.labels,
            "text": layout.text, "groups": groups,
        },
    }  # fmt: skip


def described(raw: bytes) -> tuple[TraceMeta, Layout]:
    """Read the metadata back.

    Raises:
        TraceError: Written by a newer version.
        KeyError, TypeError, ValueError: Not what this file writes.
    """
    data = json.loads(raw)
    if int(data["schema"]) > SCHEMA_VERSION:
        raise TraceError(
            f"written by a newer expertmix (trace schema {data['schema']}, this one reads up to "
            f"{SCHEMA_VERSION}). Upgrade expertmix."
        )
    meta = TraceMeta(
        fingerprint=data["fingerprint"],
        model=data["model"],
        sites=tuple(_info(site) for site in data["sites"]),
        interventions=tuple(data["interventions"]),
        settings=dict(data["settings"]),
        versions=dict(data["versions"]),
        created=data["created"],
        schema=int(data["schema"]),
    )
    return meta, _layout(data["layout"])


def _info(data: Mapping[str, Any]) -> SiteInfo:
    site = Site(data["name"], data["step"])
    return SiteInfo(site, data["num_experts"], data["top_k"], tuple(data["experts"]))


def _layout(data: Mapping[str, Any]) -> Layout:
    shapes = {
        Site(site["name"], site["step"]): Shape(
            group["num_experts"], group["top_k"], group["logits"]
        )
        for group in data["groups"]
        for site in group["sites"]
    }
    return Layout(shapes, data["precision"], data["token_ids"], data["labels"], data["text"])
