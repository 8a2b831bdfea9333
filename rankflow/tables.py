"""Tables for the terminal: squeezes, inspections, ledgers, policies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.table import Table

from rankflow.names import arrange

if TYPE_CHECKING:
    from pathlib import Path

    from rankflow.config import Description
    from rankflow.inspection import Inspection
    from rankflow.ledger import Event
    from rankflow.plan import Layout
    from rankflow.policy import Phase
    from rankflow.squeezed import SqueezeReport

_MOST_ROWS = 48  # a table longer than this is summed up by type of module
_BARS = "▁▂▃▄▅▆▇█"


def _table(title: str, *columns: str, caption: str | None = None) -> Table:
    """A table of numbers, and of text in columns whose heading ends in a colon."""
    table = Table(
        title=title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=0
    )
    for column in columns:  # on a narrow terminal names are folded, numbers never cut
        text = column.endswith(":")
        table.add_column(
            column.removesuffix(":"), justify="left" if text else "right", no_wrap=not text, overflow="fold"
        )
    return table


def _span(values: Iterable[int]) -> str:
    low, high = min(values := list(values)), max(values)
    return str(low) if low == high else f"{low} to {high}"


def squeeze_table(report: SqueezeReport) -> Table:
    """Rank, energy and parameters before and after, by module, or by type where there are many."""
    size = f"{decimal(report.bytes_before)} to {decimal(report.bytes_after)}"
    table = _table(
        f"{report.source}: {size} of factors",
        "module:",
        "rank",
        "to",
        "energy kept",
        "error |dW|",
        "parameters",
        caption="\n".join(report.notes) or None,
    )
    modules = {m.name: m for m in report.modules}
    rows = arrange(modules)
    if len(rows) <= _MOST_ROWS:
        groups = [(row.short, [modules[row.name]]) for row in rows]
    else:
        types = dict.fromkeys(row.type for row in rows)
        groups = [(t, [modules[row.name] for row in rows if row.type == t]) for t in types]
        groups = [(f"{t}  ({len(members)})", members) for t, members in groups]
    for label, members in groups:
        kept = sorted(m.energy_kept for m in members)
        table.add_row(
            label,
            _span(m.rank_before for m in members),
            _span(m.rank_after for m in members),
            f"{kept[0]:.2%}" if len(kept) == 1 else f"{kept[0]:.2%} to {kept[-1]:.2%}",
            f"{math.hypot(*(m.error for m in members)):.3g}",
            f"{sum(m.params_after for m in members):,}",
        )
    table.add_section()
    table.add_row(
        "all",
        str(sum(m.rank_before for m in report.modules)),
        str(sum(m.rank_after for m in report.modules)),
        f"{report.energy_kept:.2%}",
        f"{report.error:.3g}",
        f"{report.params_after:,}",
    )
    return table


def inspection_table(inspection: Inspection) -> Table:
    """Every module's spectrum, as bars of log sigma over four decades, and what follows from it."""
    heads = [f"E{k}" for k in inspection.modules[0].energy]
    table = _table(
        f"{inspection.source}: {len(inspection.modules)} modules, {inspection.params:,} parameters, "
        f"{decimal(inspection.bytes)} of factors",
        "module:",
        "rank",
        "eff.",
        "sigma1",
        "spectrum:",
        *heads,
        caption="\n".join(
            [*inspection.notes, "eff.: effective rank, exp of the spectrum's entropy; Ek: energy in the k largest"]
        ),
    )
    modules = {m.name: m for m in inspection.modules}
    before = None
    for row in arrange(modules):
        m = modules[row.name]
        if before not in (None, row.type):
            table.add_section()
        before = row.type
        table.add_row(
            row.short,
            str(m.rank),
            f"{m.rank_effective:.1f}",
            f"{m.sigma[0]:.3g}",
            _bars(m.sigma),
            *(f"{share:.0%}" for share in m.energy.values()),
        )
    return table


def _bars(sigma: Sequence[float], width: int = 8) -> str:
    """Singular values relative to the first, each of at most `width` bars half a decade a step."""
    if not sigma[0] > 0:
        return "zero"
    picked = [sigma[i * len(sigma) // min(width, len(sigma))] for i in range(min(width, len(sigma)))]
    heights = [7 + 2 * math.log10(max(s / sigma[0], 1e-4)) for s in picked]
    return "".join(_BARS[max(0, round(h))] for h in heights)


def events_table(events: Sequence[Event]) -> Table:
    """What happened when, and why."""
    table = _table("Events", "step", "event:", "modules", "total rank", "why:")
    for event in events:
        ranks: Mapping[str, int] = event.get("ranks", {})
        kind = event["event"]
        why = str(event.get("reason", "")) or ", ".join(event.get("notes", []))
        table.add_row(
            str(event["step"]),
            f"{kind}, {event['policy']}" if "policy" in event else kind,
            str(len(ranks) or ""),
            f"{event['total_rank']:,}" if "total_rank" in event else "",
            why,
        )
    return table


def ranks_table(history: Sequence[tuple[int, Mapping[str, int]]]) -> Table:
    """Every module's rank from the first step to the last."""
    first, last = history[0][1], history[-1][1]
    top = max(1, *(max(ranks.values()) for _, ranks in history))
    table = _table(
        f"Ranks from step {history[0][0]} to {history[-1][0]}", "module:", "first", "over the events:", "last"
    )
    before = None
    for row in arrange(first):
        if before not in (None, row.type):
            table.add_section()
        before = row.type
        ranks = [ranks[row.name] for _, ranks in history]
        bars = "".join(" " if r == 0 else _BARS[math.ceil(r / top * 8) - 1] for r in ranks)
        table.add_row(row.short, str(first[row.name]), bars, str(last[row.name]))
    table.add_section()
    table.add_row("all", str(sum(first.values())), "", str(sum(last.values())))
    return table


def phases_table(phases: Sequence[Phase], layout: Layout, title: str) -> Table:
    """When each phase of a lifecycle decides, and what budget it ends with."""
    table = _table(
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
    table = _table("Modules and the ranks they may have", "module:", "how many", "rank", "least", "most", "of these:")
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
            _span(s.rank for s in slots),
            _span(s.min_rank for s in slots),
            _span(s.max_rank for s in slots),
            "; ".join(sorted(extra)) or "any",
        )
    return table


def policies_table(policies: Sequence[Description], files: Mapping[str, Path]) -> Table:
    """The policies there are, and the policy files that ship."""
    table = _table("Policies", "policy:", "what it does:", "source:")
    table.caption = f"shipped policy files, by name: {', '.join(files)}"
    for policy in policies:
        table.add_row(policy.name, policy.summary, policy.source)
    return table


def policy_table(policy: Description) -> Table:
    """The parameters of one policy."""
    table = _table(f"{policy.name}: params", "name:", "type:", "default:", "meaning:")
    table.caption = policy.source
    for setting in policy.settings:
        default = "null" if setting.default is None else str(setting.default)
        table.add_row(setting.name, setting.type, default, setting.meaning)
    return table
