"""Tables for the terminal: squeezes, inspections, ledgers, policies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.table import Table

from rankflow.linalg.spectrum import relative
from rankflow.plans.names import arrange, shown

if TYPE_CHECKING:
    from pathlib import Path

    from rankflow.analysis.difference import Difference
    from rankflow.analysis.forecast import Cost
    from rankflow.analysis.inspection import Inspection
    from rankflow.analysis.intruders import Intruders
    from rankflow.analysis.run_comparison import Comparison
    from rankflow.compress.accept import Trial
    from rankflow.compress.report import SqueezeReport
    from rankflow.config.load import Description
    from rankflow.plans.layout import Layout
    from rankflow.policies.lifecycle import Phase
    from rankflow.serving.verdicts import Verdict
    from rankflow.training.ledger import Event

_MOST_ROWS = 48  # a table longer than this is summed up by type of module
_MOST_NAMES = 4
_LONGEST = 500  # characters of a cell
_HEADING = 9  # characters of a line of a heading over numbers, which are seldom wider
_BARS = "▁▂▃▄▅▆▇█"


def new_table(title: str, *columns: str, caption: str | None = None) -> Table:
    """A table of numbers, and of text in columns whose heading ends in a colon."""
    table = _Table(
        title=shown(title, most=_LONGEST),
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
    )
    for column in columns:  # on a narrow terminal names are folded, numbers never cut
        text = column.endswith(":")
        heading = column.removesuffix(":") if text else "\n".join(wrap(column, _HEADING, break_long_words=False))
        table.add_column(heading, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    return table


class _Table(Table):
    """Each cell is one line, whatever is in it."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(shown(c, most=_LONGEST) if isinstance(c, str) else c for c in cells), **options)


def _shares(values: Iterable[float]) -> str:
    low, high = min(values := list(values)), max(values)
    return f"{low:.2%}" if len(values) == 1 else f"{low:.2%} to {high:.2%}"


def span(values: Iterable[int]) -> str:
    low, high = min(values := list(values)), max(values)
    return str(low) if low == high else f"{low} to {high}"


def squeeze_table(report: SqueezeReport) -> Table:
    """Rank, energy, errors and parameters before and after, by module, or by type where there are many."""
    size = f"{decimal(report.bytes_before)} to {decimal(report.bytes_after)}"
    metric = report.metric
    largest = max(report.ranks.values(), default=0)
    bucket = f"vLLM's --max-lora-rank {report.serving_bucket}" if report.serving_bucket else "more than vLLM serves"
    table = new_table(
        f"{report.source}: {size} of factors",
        "module:",
        "rank",
        "to",
        "energy kept",
        "weight error",
        *([f"{metric} error"] if metric != "weights" else []),
        "parameters",
        caption="\n".join(
            map(shown, (f"largest rank {largest}: {bucket}", *carried_along(report.carried), *report.notes))
        ),
    )
    modules = {m.name: m for m in report.modules}
    for label, names in _groups(modules):
        members = [modules[name] for name in names]
        in_metric = [m.relative_error for m in members if m.metric == metric]
        table.add_row(
            label,
            span(m.rank_before for m in members),
            span(m.rank_after for m in members),
            _shares(m.energy_kept for m in members),
            _shares(m.weight_error for m in members),
            *([_shares(in_metric) if in_metric else "by weights"] if metric != "weights" else []),
            f"{sum(m.params_after for m in members):,}",
        )
    table.add_section()
    table.add_row(
        "all",
        str(sum(m.rank_before for m in report.modules)),
        str(sum(m.rank_after for m in report.modules)),
        f"{report.energy_kept:.2%}",
        f"{report.weight_error:.2%}",
        *([f"{report.relative_error:.2%}"] if metric != "weights" else []),
        f"{report.params_after:,}",
    )
    return table


def carried_along(carried: Mapping[str, int]) -> list[str]:
    """What an adapter holds beside factors, with the largest by name."""
    if not carried:
        return []
    largest = sorted(carried, key=lambda name: (-carried[name], name))[:_MOST_NAMES]
    more = len(carried) - len(largest)
    names = ", ".join(f"{name} ({decimal(carried[name])})" for name in largest) + (f" and {more} more" if more else "")
    return [f"carried along, not squeezed: {len(carried)} tensors, {decimal(sum(carried.values()))}: {names}"]


def verdict_table(found: Verdict) -> Table:
    """What an engine, or the base, would get wrong, whether it says so, and what to do."""
    table = new_table(
        f"{found.source}, {f'served by {found.engine}' if found.engine else f'on {found.base}'}",
        "what:",
        f"what {found.engine or 'the base'} does:",
        "told?:",
        "remedy:",
    )
    for problem in found.problems:
        table.add_row(problem.where, problem.does, problem.fate.value, problem.remedy)
    return table


def trials_table(trials: Sequence[Trial]) -> Table:
    """What a gate said of which rank, in the order it was asked."""
    table = new_table("Tried", "rank", "gate:", "seconds")
    for trial in trials:
        table.add_row(str(trial.rank), "passed" if trial.passed else "failed", f"{trial.seconds:.1f}")
    return table


def difference_table(found: Difference) -> Table:
    """Ranks, norms and distances by module, or by type where there are many."""
    table = new_table(
        f"{found.first} and {found.second}", "module:", "ranks", "|dW|", "|dW'|", "|dW - dW'|", "over |dW|"
    )
    modules = {m.name: m for m in found.modules}
    for label, names in _groups(modules):
        members = [modules[name] for name in names]
        first, second = (math.hypot(*(m.norms[i] for m in members)) for i in range(2))
        distance = math.hypot(*(m.distance for m in members))
        ranks = " and ".join(span(m.ranks[i] for m in members) for i in range(2))
        table.add_row(label, ranks, *(f"{x:.3g}" for x in (first, second, distance, relative(distance, first))))
    table.add_section()
    total = (*found.norms, found.distance, found.relative)
    table.add_row("all", "", *(f"{x:.3g}" for x in total))
    return table


def _groups(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Rows of a table by module, or by type of module where that would be too many: (label, its modules)."""
    rows = arrange(names)
    if len(rows) <= _MOST_ROWS:
        return [(row.short, [row.name]) for row in rows]
    types = {t: [row.name for row in rows if row.type == t] for t in dict.fromkeys(row.type for row in rows)}
    return [(f"{t}  ({len(members)})", members) for t, members in types.items()]


def inspection_table(inspection: Inspection) -> Table:
    """Every module's spectrum, as bars of log sigma over four decades, and what follows from it."""
    heads = [f"E{k}" for k in inspection.modules[0].energy]
    measured = [m for m in inspection.modules if m.tokens is not None]
    captions = [
        *carried_along(inspection.carried),
        *inspection.notes,
        "eff.: effective rank, exp of the spectrum's entropy; stable: sum of squares over the largest square; noise: "
        "its edge; above it: as many directions, which squeeze --auto keeps; Ek: energy in the k largest",
        *(["eff. in outputs, loss: of the spectrum in that metric of data"] if inspection.metrics else []),
        *([f"intruders: {intruders_mean(inspection)}"] if inspection.base else []),
    ]
    table = new_table(
        f"{inspection.source}: {len(inspection.modules)} modules, {inspection.params:,} parameters, "
        f"{decimal(inspection.bytes)} of factors",
        "module:",
        "rank",
        "eff.",
        "stable",
        "sigma1",
        "noise",
        "above it",
        "spectrum:",
        *heads,
        *(["tokens"] if measured else []),
        *(f"eff. in {metric}" for metric in inspection.metrics),
        *(["intruders"] if inspection.base else []),
        caption="\n".join(map(shown, captions)),
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
            f"{m.rank_stable:.1f}",
            f"{m.sigma[0]:.3g}",
            f"{m.noise_threshold:.3g}",
            str(m.rank_above_noise),
            _bars(m.sigma),
            *(f"{share:.0%}" for share in m.energy.values()),
            *([f"{m.tokens:,}"] if m.tokens is not None else []),
            *(f"{m.metrics[k].rank_effective:.1f}" if k in m.metrics else "" for k in inspection.metrics),
            *([_intruders(m.intruders)] if inspection.base else []),
        )
    return table


def intruders_mean(inspection: Inspection) -> str:
    return (
        "left singular vectors of W0 + DeltaW, of so many that were looked at, with no cosine of "
        f"{inspection.epsilon:g} to any of W0 (arXiv 2410.21228)"
    )


def _intruders(found: Intruders | None) -> str:
    return "" if found is None else f"{len(found.found)} of {found.top_k}"


def types_table(inspection: Inspection) -> Table:
    """The modules of an adapter summed up by type."""
    heads = [f"E{k}" for k in inspection.modules[0].energy]
    table = new_table(
        "By type of module: means",
        *("type:", "modules", "ranks", "rank", "eff.", "stable", "above", *heads, "share"),
        *(["intruders"] if inspection.base else []),
        caption="above: directions above the noise; share: of the energy of the adapter",
    )
    for found in inspection.types:
        table.add_row(
            found.type,
            str(found.modules),
            span((found.rank_min, found.rank_max)),
            *(f"{x:.1f}" for x in (found.rank, found.rank_effective, found.rank_stable, found.rank_above_noise)),
            *(f"{share:.0%}" for share in found.energy.values()),
            f"{found.energy_share:.1%}",
            *(["" if found.intruders is None else str(found.intruders)] if inspection.base else []),
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
    table = new_table("Events", "step", "event:", "modules", "total rank", "why:")
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


def gates_table(fold: Event) -> Table:
    """What the gates of a phase came to, module by module, from its `fold` event."""
    reports: Mapping[str, Mapping[str, float]] = fold["gates"]
    keys = list(dict.fromkeys(key for report in reports.values() for key in report))
    table = new_table(
        f"Gates of {fold['policy']}, folded at step {fold['step']}",
        "module:",
        *(key.replace("_", "\n") for key in keys),
    )
    for row in arrange(reports):
        table.add_row(row.short, *(_number(reports[row.name].get(key)) for key in keys))
    if total := fold["total"]:
        table.add_section()
        table.add_row("all", *(_number(total.get(key)) for key in keys))
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value % 1 or value >= 1e5 else str(int(value))


def comparison_table(found: Comparison) -> Table:
    """Of runs that part: what each makes of the modules that they do not agree on, and how close that was."""
    assert found.did is not None
    assert found.margins is not None
    known = [f"{m:.3g}" if m is not None else "not known" for m in found.margins]
    caption = f"margin: {known[0]} in the first run and {known[1]} in the second, the least share by which a direction "
    caption += "that was taken scores above one that was not; near 0, last digits decide"
    table = new_table(f"Step {found.step}", "module:", "first run:", "second run:", caption=caption)
    table.add_row("", *found.did)
    table.add_section()
    for module in found.modules:
        table.add_row(module.name, module.first, module.second)
    return table


def rank_bars(ranks: Iterable[int], top: int, absent: str = " ") -> str:
    """A bar for each rank, `top` being the highest."""
    return "".join(absent if r == 0 else _BARS[math.ceil(r / top * 8) - 1] for r in ranks)


def ranks_table(history: Sequence[tuple[int, Mapping[str, int]]]) -> Table:
    """Every module's rank from the first step to the last."""
    first, last = history[0][1], history[-1][1]
    top = max(1, *(max(ranks.values()) for _, ranks in history))
    table = new_table(
        f"Ranks from step {history[0][0]} to {history[-1][0]}", "module:", "first", "over the events:", "last"
    )
    before = None
    for row in arrange(first):
        if before not in (None, row.type):
            table.add_section()
        before = row.type
        ranks = [ranks[row.name] for _, ranks in history]
        bars = rank_bars(ranks, top)
        table.add_row(row.short, str(first[row.name]), bars, str(last[row.name]))
    table.add_section()
    table.add_row("all", str(sum(first.values())), "", str(sum(last.values())))
    return table


# -- policies and what they mean for a model ---------------------------------------------------------------------------


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
