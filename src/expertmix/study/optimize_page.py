"""The page of a run of `expertmix optimize`: rows and lines as what `report.remix_report` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expertmix.core.site import SiteInfo
from expertmix.optimize.table import line_of, settings_of
from expertmix.report import places, words
from expertmix.report.remix_data import (
    Kind,
    Move,
    Near,
    RemixItem,
    RemixLine,
    Turn,
)
from expertmix.report.remix_report import RemixReport
from expertmix.study.contestants import Contestant
from expertmix.study.optimize_plan import OptimizePlan
from expertmix.study.optimize_rows import ItemRow
from expertmix.study.optimize_settings import OptimizeJob
from expertmix.study.optimize_summary import Line
from expertmix.study.optimize_verdict import unbeaten


def optimize_page(
    plan: OptimizePlan,
    rows: Sequence[ItemRow],
    lines: Sequence[Line],
    content: Mapping[str, Any],
) -> RemixReport:
    """The page of a run.

    Args:
        plan: Of the job.
        rows: All of them.
        lines: A line per contestant.
        content: Of results.json.
    """
    job, by_name = plan.job, {one.name: one for one in plan.contestants}
    main = next((line.method for line in lines if line.kind == "method"), "")
    texts = {number: (item.prompt, item.choices) for number, item in enumerate(plan.task.items)}
    return RemixReport(
        title="Does better routing help?",
        model=job.model,
        task=f"{words.counted(len(plan.task.items), 'item')} of {job.task}",
        lines=[_line(line, by_name[line.method], main, rows, lines) for line in lines],
        items=[_item(row) for row in rows],
        sites=_places(plan.sites),
        experts=_experts(plan.sites),
        said=list(content["shows"]),
        facts=_facts(plan, rows, content),
        texts=texts if job.text else None,
    )


def _line(
    line: Line,
    contestant: Contestant,
    main: str,
    rows: Sequence[ItemRow],
    lines: Sequence[Line],
) -> RemixLine:
    kind: Kind = "rival" if line.kind == "method" and line.method != main else line.kind
    own = [row for row in rows if row.method == line.method]
    return RemixLine(
        method=line.method, kind=kind, items=line.items, accuracy=line.accuracy,
        loss=line.loss, change=line.change, milliseconds=line.milliseconds,
        relative=line.relative, dense=line.dense, gained=line.moved.gained, lost=line.moved.lost,
        p=line.p, p_holm=line.p_holm, gap=line.gap, changed=line.changed, refused=line.refused,
        of=line_of(contestant.method) if contestant.method and contestant.twist else "",
        doubted=tuple(one.control for one in unbeaten(rows, lines, line)),
        settings=_settings(contestant), stages=_stages(own),
        shifts=contestant.method is not None and contestant.method.mode == "add",
    )  # fmt: skip


def _settings(contestant: Contestant) -> str:
    if contestant.method is None:
        return f"seed {contestant.seed}" if contestant.twist else ""
    pairs = [f"{key}={value}" for key, value in settings_of(contestant.method).items()]
    return ", ".join([contestant.method.name, *pairs])


def _stages(rows: Sequence[ItemRow]) -> dict[str, float]:
    """Milliseconds per item."""
    names = dict.fromkeys(stage for row in rows for stage in row.stages)
    return {
        stage: 1000 * sum(row.stages.get(stage, 0.0) for row in rows) / len(rows) for stage in names
    }


def _item(row: ItemRow) -> RemixItem:
    return RemixItem(
        item=row.item, name=row.name, method=row.method, gold=row.gold, base=tuple(row.base),
        scores=tuple(row.scores), correct=row.correct, base_correct=row.base_correct,
        loss=row.loss, base_loss=row.base_loss, label=row.label, dense=tuple(row.dense),
        turns=tuple(_turn(row, order) for order in range(len(row.neighbors))) or (Turn(),),
    )  # fmt: skip


def _turn(row: ItemRow, order: int) -> Turn:
    near = zip(
        row.neighbors[order], row.similarity[order], row.weights[order], strict=True
    )  # fmt: skip
    return Turn(
        neighbors=tuple(Near(*one) for one in near),
        dropped=row.dropped[order] if row.dropped else 0,
        losses=tuple(row.losses[order]),
        reason=row.refused[order],
        move=_move(row.moved[order] if row.moved else None),
    )


def _move(found: Mapping[str, Any] | None) -> Move | None:
    if found is None:
        return None
    before, after = (
        tuple({int(expert): weight for expert, weight in site} for site in found[when])
        for when in ("before", "after")
    )
    return Move(before, after, tuple(found["kl"]))


def _places(sites: Sequence[SiteInfo]) -> list[str]:
    names = places.short_names([info.site for info in sites])
    noun = places.noun(names)
    return [f"{noun} {name}" if noun == "layer" else name for name in names.values()]


def _experts(sites: Sequence[SiteInfo]) -> list[str]:
    named = sites[0].experts if len({info.experts for info in sites}) == 1 else ()
    return list(named or map(str, range(max(info.num_experts for info in sites))))


def _facts(
    plan: OptimizePlan, rows: Sequence[ItemRow], content: Mapping[str, Any]
) -> dict[str, str]:
    job = plan.job
    dropped = max(_dropped(rows, one.name) for one in plan.contestants)
    return {
        "Architecture": plan.architecture,
        "Fingerprint": content["fingerprint"][:16],
        "Adapters": "" if job.adapters is None else f"{job.adapters}, router {job.router}",
        "Items": _asked(content),
        "Reference set": (
            f"{job.reference}: {words.count(content['references_tried'])} tried, "
            f"{words.count(content['references_kept'])} answered right and kept; "
            f"{words.counted(dropped, 'near-duplicate')} of items left out on looking for neighbors"
        ),
        "Critical layers": f"{job.layers}: {words.listed([str(i.site) for i in plan.sites], 12)}",
        "Decision tokens": _decisions(job),
        "Neighbors": _pairs(content["neighbors"]),
        "Gate": _pairs(content["gate"]) or "none: all items are adapted",
        "Read again": "only the suffix that routing can change"
        if content["exact_suffix"]
        else "the whole text: the exact suffix does not fit this model",
        "Seed": str(job.seed),
        "Batch size": str(job.batch_size),
        "Machine": _pairs(content["machine"]),
        "Versions": _pairs(content["versions"]),
    }


def _decisions(job: OptimizeJob) -> str:
    last = "the last one" if job.decisions == 1 else f"the last {job.decisions}"
    return f"{last} of the prompt" + (", and all of the options" if job.scored else "")


def _dropped(rows: Sequence[ItemRow], method: str) -> int:
    return sum(sum(row.dropped) for row in rows if row.method == method)


def _asked(content: Mapping[str, Any]) -> str:
    told = (
        f"{words.count(content['items'])}, asked {words.counted(content['asked'], 'time')}; style "
        f"{content['style']}, {_divided(content['units'])}; orders of options: "
        f"{content['orders']}"
    )
    left = len(content["left_out"])
    return f"{told}; {words.counted(left, 'item')} left out" if left else told


def _divided(units: str) -> str:
    return "log-probabilities of options" + ("" if units == "none" else f" per their {units}")


def _pairs(values: Mapping[str, Any]) -> str:
    known = {key: value for key, value in values.items() if value not in (None, "")}
    return ", ".join(f"{key} {value}" for key, value in known.items())
