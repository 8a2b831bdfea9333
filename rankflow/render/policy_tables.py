"""Tables for the terminal: policies, their parameters, and what they mean for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.filesize import decimal
from rich.table import Table

from rankflow.plans.names import arrange
from rankflow.render.tables import new_table, span

if TYPE_CHECKING:
    from pathlib import Path

    from rankflow.analysis.forecast import Cost
    from rankflow.config.load import Description
    from rankflow.plans.plan import Layout
    from rankflow.policies.base import Phase


def phases_table(phases: Sequence[Phase], layout: Layout, title: str) -> Table:
    """When each phase of a lifecycle decides, and what budget it ends with."""
    table = new_table(
        title,
        "phase:",
        "steps",
        "decisions",
        "decides after step:",
        "budget:",
        caption=f"{len(layout)} modules, total rank {layout.total_rank:,}, {layout.params:,} parameters at the start",
    )
    for phase in phases:
        studied = any(study.when == "start" for study in phase.policy.studies)  # which ends in a decision
        events = [*([phase.begin] if studied else []), *phase.policy.when.events]
        shown = events if len(events) <= 8 else [*events[:5], "...", events[-1]]
        budget = phase.policy.budget
        mean = f" (mean rank {budget.amount / len(layout):.2f})" if budget and budget.kind == "total_rank" else ""
        table.add_row(
            phase.name,
            f"{phase.begin} to {phase.end - 1}",
            str(len(events)),
            ", ".join(map(str, shown)) or "never",
            f"{budget}{mean}" if budget else "as it is",
        )
    return table


def limits_table(layout: Layout) -> Table:
    """Which ranks modules have and may have, by type."""
    table = new_table(
        "Modules and the ranks they may have", "module:", "how many", "rank", "least", "most", "of these:"
    )
    rows = arrange(layout)
    for kind in dict.fromkeys(row.type for row in rows):
        slots = [layout[row.name] for row in rows if row.type == kind]
        extra = {
            *(f"buckets {', '.join(map(str, s.buckets))}" for s in slots if s.buckets),
            *(f"multiples of {s.multiple}" for s in slots if s.multiple > 1),
            *("tied" for s in slots if s.tie),
        }
        table.add_row(
            kind,
            str(len(slots)),
            span(s.rank for s in slots),
            span(s.min_rank for s in slots),
            span(s.max_rank for s in slots),
            "; ".join(sorted(extra)) or "any",
        )
    return table


def costs_table(costs: Sequence[Cost]) -> Table:
    """Memory and messages, from the start to the end of every phase."""
    table = new_table(
        "What it takes, in one process",
        ":",
        "total rank",
        "parameters",
        "adapter",
        "Adam's moments",
        "statistics",
        "a step sends",
        "listening",
        "a resize, at most",
        caption="Budgets spread evenly over modules. What is sent is between processes, where there are several.",
    )
    for cost in costs:
        sizes = (cost.adapter, cost.optimizer, cost.statistics, cost.step, cost.listen, cost.resize)
        table.add_row(
            cost.when, f"{cost.layout.total_rank:,}", f"{cost.layout.params:,}", *(decimal(size) for size in sizes)
        )
    return table


def policies_table(policies: Sequence[Description], files: Mapping[str, Path]) -> Table:
    """The policies there are, and the policy files that ship."""
    table = new_table("Policies", "policy:", "what it does:", "source:")
    table.caption = f"shipped policy files, by name: {', '.join(files)}"
    for policy in policies:
        table.add_row(policy.name, policy.summary, policy.source)
    return table


def policy_table(policy: Description) -> Table:
    """The parameters of one policy."""
    table = new_table(f"{policy.name}: params", "name:", "type:", "default:", "meaning:")
    table.caption = policy.source
    for setting in policy.settings:
        default = "null" if setting.default is None else str(setting.default)
        table.add_row(setting.name, setting.type, default, setting.meaning)
    return table
