"""Tables about policies: which there are, and what they mean for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.filesize import decimal

from rankflow.plans.names import by_type
from rankflow.render.table import (
    Cell,
    Column,
    Table,
    module,
    number,
    span,
    word,
)

if TYPE_CHECKING:
    from pathlib import Path

    from rankflow.analysis.forecast import Cost
    from rankflow.config.load import Description
    from rankflow.plans.layout import Layout
    from rankflow.policies.lifecycle import Phase


def phases_table(phases: Sequence[Phase], layout: Layout, title: str) -> Table:
    """When each phase of a lifecycle decides, and what budget it ends with; phases that never decide are marked."""
    rows = []
    for phase in phases:
        studied = any(study.when == "start" for study in phase.policy.studies)  # which ends in a decision
        events = [*([phase.begin] if studied else []), *phase.policy.when.events]
        told = events if len(events) <= 8 else [*events[:5], "...", events[-1]]
        budget = phase.policy.budget
        mean = f" (mean rank {budget.amount / len(layout):.2f})" if budget and budget.kind == "total_rank" else ""
        rows.append(
            [
                word(phase.name),
                word(f"{phase.begin} to {phase.end - 1}"),
                number(len(events)),
                word(", ".join(map(str, told)) or "never"),
                word(f"{budget}{mean}" if budget else "as it is"),
            ]
        )
    columns = [
        Column("phase", text=True),
        *(Column("steps"), Column("decisions")),
        *(Column("decides after step", text=True), Column("budget", text=True)),
    ]
    start = f"{len(layout)} modules, total rank {layout.total_rank:,}, {layout.params:,} parameters at the start"
    return Table(title, columns, rows, start)


def limits_table(layout: Layout) -> Table:
    """Which ranks modules have and may have, by type."""
    rows = []
    for kind, members in by_type(layout).items():
        slots = [layout[row.name] for row in members]
        extra = {
            *(f"buckets {', '.join(map(str, s.buckets))}" for s in slots if s.buckets),
            *(f"multiples of {s.multiple}" for s in slots if s.multiple > 1),
            *("tied" for s in slots if s.tie),
        }
        ranks = zip(*((s.rank, s.min_rank, s.max_rank) for s in slots), strict=True)
        label = module(members[0].label, kind)
        rows.append([label, number(len(slots)), *map(span, ranks), word("; ".join(sorted(extra)) or "any")])
    columns = [Column("module", text=True), *map(Column, ("how many", "rank", "least", "most"))]
    return Table("Modules and the ranks they may have", [*columns, Column("of these", text=True)], rows)


def costs_table(costs: Sequence[Cost]) -> Table:
    """Memory and messages, from the start to the end of every phase."""
    heads = ["total rank", "parameters", "adapter", "Adam's moments", "statistics"]
    heads += ["a step sends", "listening", "a resize, at most"]
    rows = [
        [
            word(cost.when),
            *(number(cost.layout.total_rank), number(cost.layout.params)),
            *(
                Cell(decimal(size), value=size)
                for size in (cost.adapter, cost.optimizer, cost.statistics, cost.step, cost.listen, cost.resize)
            ),
        ]
        for cost in costs
    ]
    about = "Budgets spread evenly over modules. What is sent is between processes, where there are several."
    return Table("What it takes, in one process", [Column("", text=True), *map(Column, heads)], rows, about)


def policies_table(policies: Sequence[Description], files: Mapping[str, Path]) -> Table:
    """The policies there are, and the policy files that ship."""
    columns = [Column(name, text=True) for name in ("policy", "what it does", "source")]
    rows = [[word(policy.name), word(policy.summary, long=True), word(policy.source)] for policy in policies]
    return Table("Policies", columns, rows, f"shipped policy files, by name: {', '.join(files)}")


def policy_table(policy: Description) -> Table:
    """The parameters of one policy."""
    rows = [
        [
            word(setting.name),
            word(setting.type),
            word("null" if setting.default is None else str(setting.default)),
            word(setting.meaning, long=True),
        ]
        for setting in policy.settings
    ]
    columns = [Column(name, text=True) for name in ("name", "type", "default", "meaning")]
    return Table(f"{policy.name}: params", columns, rows, policy.source)
