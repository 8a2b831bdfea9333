"""The tables of all reports: squeezes, inspections, runs, policies; shown on a terminal and in pages."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from rankflow.linalg.spectrum import relative
from rankflow.plans.names import Row, arrange, shown
from rankflow.render.table import Cell, Column, Table, curve, module, number, rank_bars, share, span, word

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
_LITTLE = 0.9  # energy kept below this share is marked
_EFFECTIVE = Column("effective", "Effective rank: exp of the entropy of the singular values over their sum")
_STABLE = Column("stable", "Stable rank: sum of squared singular values over the largest square")
_ABOVE = Column("above noise", "Singular values above the noise threshold; the rank that squeeze --auto gives")


# -- saved adapters ---------------------------------------------------------------------------------------------------


def squeeze_table(report: SqueezeReport, *, every: bool = False) -> Table:
    """Rank, energy, errors and parameters by module, or by type where there are many and not `every` one is wanted."""
    metric = report.metric
    modules = {m.name: m for m in report.modules}
    rows = []
    for label, members in _groups(modules, every=every):
        found = [modules[name] for name in members]
        in_metric = [m.relative_error for m in found if m.metric == metric]
        one = share(found[0].energy_kept) if len(found) == 1 else span((m.energy_kept for m in found), "{:.2%}")
        rows.append(
            [
                label,
                span(m.rank_before for m in found),
                span(m.rank_after for m in found),
                _marked(one, min(m.energy_kept for m in found) < _LITTLE),
                span((m.weight_error for m in found), "{:.2%}"),
                *([span(in_metric, "{:.2%}") if in_metric else word("by weights")] if metric != "weights" else []),
                number(sum(m.params_after for m in found)),
            ]
        )
    columns = [
        Column("module", text=True),
        Column("rank before"),
        Column("rank after"),
        Column("energy kept", "Share of the squared singular values, in the metric, that is left"),
        Column("weight error", "Relative error of ΔW"),
        *([Column(f"{metric} error", "Relative error in the metric")] if metric != "weights" else []),
        Column("parameters"),
    ]
    total = [
        word("all"),
        number(sum(m.rank_before for m in report.modules)),
        number(sum(m.rank_after for m in report.modules)),
        number(report.energy_kept, "{:.2%}"),
        number(report.weight_error, "{:.2%}"),
        *([number(report.relative_error, "{:.2%}")] if metric != "weights" else []),
        number(report.params_after),
    ]
    size = f"{decimal(report.bytes_before)} to {decimal(report.bytes_after)}"
    notes = (*_serving(report), *carried_along(report.carried), *report.notes)
    return Table(f"{report.source}: {size} of factors", columns, rows, "\n".join(map(shown, notes)), total)


def _serving(report: SqueezeReport) -> list[str]:
    """What vLLM has to be told, of an adapter that it may serve."""
    if not report.language_model:
        return []
    bucket = report.serving_bucket
    most = max(report.ranks.values(), default=0)
    return [f"largest rank {most}: {f'vLLM --max-lora-rank {bucket}' if bucket else 'more than vLLM serves'}"]


def carried_along(carried: Mapping[str, int]) -> list[str]:
    """What an adapter holds beside factors, with the largest by name."""
    if not carried:
        return []
    largest = sorted(carried, key=lambda name: (-carried[name], name))[:_MOST_NAMES]
    more = len(carried) - len(largest)
    names = ", ".join(f"{name} ({decimal(carried[name])})" for name in largest) + (f" and {more} more" if more else "")
    return [f"carried along, not squeezed: {len(carried)} tensors, {decimal(sum(carried.values()))}: {names}"]


def carried_table(carried: Mapping[str, int]) -> Table:
    """The tensors of an adapter that are no factors."""
    rows = [[word(name), number(size)] for name, size in carried.items()]
    return Table("Carried along", [Column("tensor", text=True), Column("bytes")], rows)


def verdict_table(found: Verdict) -> Table:
    """What an engine, or the base, would get wrong, whether it says so, and what to do."""
    columns = ["what", f"what {found.engine or 'the base'} does", "told?", "remedy"]
    return Table(
        f"{found.source}, {f'served by {found.engine}' if found.engine else f'on {found.base}'}",
        [Column(name, text=True) for name in columns],
        [[word(p.where, marked=True), *map(word, (p.does, p.fate.value, p.remedy))] for p in found.problems],
    )


def acceptance_table(trials: Sequence[Trial]) -> Table:
    """Which rank was accepted, in the order they were tried."""
    rows = [
        [number(t.rank), word("passed" if t.passed else "failed", marked=not t.passed), number(t.seconds, "{:.1f}")]
        for t in trials
    ]
    return Table("Tried", [Column("rank"), Column("accepted", text=True), Column("seconds")], rows)


def difference_table(found: Difference) -> Table:
    """Ranks, norms and distances by module, or by type where there are many."""
    modules = {m.name: m for m in found.modules}
    rows = []
    for label, members in _groups(modules):
        these = [modules[name] for name in members]
        first, second = (math.hypot(*(m.norms[i] for m in these)) for i in range(2))
        distance = math.hypot(*(m.distance for m in these))
        ranks = " and ".join(span(m.ranks[i] for m in these).text for i in range(2))
        rows.append([label, word(ranks), *_figures(first, second, distance, relative(distance, first))])
    columns = [Column("module", text=True), *map(Column, ("ranks", "|dW|", "|dW'|", "|dW - dW'|", "over |dW|"))]
    total = [word("all"), word(""), *_figures(*found.norms, found.distance, found.relative)]
    return Table(f"{found.first} and {found.second}", columns, rows, total=total)


def inspection_table(inspection: Inspection) -> Table:
    """Every module's spectrum, and what follows from it."""
    modules = {m.name: m for m in inspection.modules}
    measured = any(m.tokens is not None for m in inspection.modules)
    top = max(m.sigma[0] for m in inspection.modules)
    columns = [
        Column("module", text=True),
        Column("rank"),
        *(_EFFECTIVE, _STABLE),
        Column("noise threshold", "The largest singular value that noise of the size of the median one has"),
        _ABOVE,
        *_intruders_column(inspection),
        Column("largest", "The largest singular value"),
        Column("spectrum", "Sorted by the largest singular value"),
        *_energies(inspection.modules[0].energy),
        Column("shape", "Parameters sort it", wide=True),
        *([Column("tokens", "That the direction measured least was measured over")] if measured else []),
        *(Column(f"effective in {k}", f"Effective rank of the spectrum in metric {k}") for k in inspection.metrics),
    ]
    rows = arrange(modules)

    def cells(row: Row) -> list[Cell]:
        m = modules[row.name]
        return [
            module(row.short, m.name),
            number(m.rank),
            *(number(x, "{:.1f}") for x in (m.rank_effective, m.rank_stable)),
            number(m.noise_threshold, "{:.3g}"),
            number(m.rank_above_noise),
            *([_intruders(m.intruders)] if inspection.base else []),
            number(m.sigma[0], "{:.3g}"),
            curve(m.sigma, top, m.noise_threshold),
            *(number(energy, "{:.0%}") for energy in m.energy.values()),
            Cell(f"{m.out_features} x {m.in_features}", value=m.params),
            *([number(m.tokens)] if measured else []),
            *(number(m.metrics[k].rank_effective if k in m.metrics else None, "{:.1f}") for k in inspection.metrics),
        ]

    title = f"{inspection.source}: {len(modules):,} modules"
    return Table(title, columns, [cells(row) for row in rows], _means(columns), breaks=_between_types(rows))


def types_table(inspection: Inspection) -> Table:
    """The modules of an adapter summed up by type."""
    columns = [
        Column("type", text=True),
        Column("modules"),
        Column("rank", "Mean over the modules"),
        *(Column("least", wide=True), Column("most", wide=True)),
        *(_EFFECTIVE, _STABLE, _ABOVE),
        *_intruders_column(inspection),
        *_energies(inspection.types[0].energy if inspection.types else ()),
        Column("share of energy", "Of the squared singular values of the whole adapter"),
    ]
    rows = [
        [
            module(t.type.lstrip("*._"), t.type),
            number(t.modules),
            number(t.rank, "{:.1f}"),
            *(number(t.rank_min), number(t.rank_max)),
            *(number(x, "{:.1f}") for x in (t.rank_effective, t.rank_stable, t.rank_above_noise)),
            *([number(t.intruders, marked=bool(t.intruders))] if inspection.base else []),
            *(number(energy, "{:.0%}") for energy in t.energy.values()),
            share(t.energy_share),
        ]
        for t in inspection.types
    ]
    ranks = [m.rank for m in inspection.modules]
    title = (
        f"{inspection.source}: {len(ranks):,} modules of rank {span(ranks).text}, {inspection.params:,} parameters, "
        f"{decimal(inspection.bytes)} of factors"
    )
    notes = (*carried_along(inspection.carried), *inspection.notes, f"means over modules; {_means(columns)}")
    return Table(title, columns, rows, "\n".join(map(shown, notes)))


def intruders_mean(inspection: Inspection) -> str:
    """What counts as an intruder."""
    return (
        "left singular vectors of W0 + DeltaW, of so many that were looked at, with no cosine of "
        f"{inspection.epsilon:g} to any of W0 (arXiv 2410.21228)"
    )


def _intruders_column(found: Inspection) -> list[Column]:
    return [Column("intruders", f"Intruders: {intruders_mean(found)}")] if found.base else []


def _intruders(found: Intruders | None) -> Cell:
    if found is None:
        return word("")
    count = len(found.found)
    return Cell(f"{count} of {found.top_k}", value=count, marked=bool(count))


def _energies(ks: Iterable[int]) -> list[Column]:
    return [Column(f"E{k}", f"Energy: share of the squared singular values in the {k} largest") for k in ks]


def _means(columns: Sequence[Column]) -> str:
    """What the headings on a terminal stand for."""
    told = {c.name: c.means for c in columns if c.means and not c.wide and not c.name.startswith("E")}
    energy = "Ek: share of the squared singular values in the k largest"
    return "; ".join([*(f"{name}: {means.partition(': ')[2] or means}" for name, means in told.items()), energy])


# -- runs -------------------------------------------------------------------------------------------------------------


def events_table(events: Sequence[Event]) -> Table:
    """What happened when, and why; decisions that were not taken are marked."""
    columns = [
        Column("step"),
        Column("event", text=True),
        Column("policy", text=True),
        Column("modules", "How many were resized"),
        Column("total rank"),
        Column("why", text=True),
    ]
    rows = [
        [
            number(int(e["step"])),
            word(str(e["event"]), marked=e["event"] == "skip"),
            word(str(e.get("policy", ""))),
            number(len(e["ranks"]) if e.get("ranks") else None),
            number(e.get("total_rank")),
            word(str(e.get("reason", "")) or ", ".join(map(str, e.get("notes", []))), long=True),
        ]
        for e in events
    ]
    return Table("Events", columns, rows)


def gates_table(fold: Event) -> Table:
    """What the gates of a phase came to, module by module, from its `fold` event."""
    reports: Mapping[str, Mapping[str, Any]] = fold["gates"]
    keys = list(dict.fromkeys(key for report in reports.values() for key in report))
    rows = arrange(reports)
    return Table(
        f"Gates of {fold['policy']}, folded at step {fold['step']}",
        [Column("module", text=True), *(Column(str(key).replace("_", " ")) for key in keys)],
        [[module(row.short, row.name), *(_figure(reports[row.name].get(key)) for key in keys)] for row in rows],
        total=[word("all"), *(_figure(fold["total"].get(key)) for key in keys)] if fold["total"] else None,
        breaks=_between_types(rows),
    )


def ranks_table(history: Sequence[tuple[int, Mapping[str, int]]]) -> Table:
    """Every module's rank from the first step to the last; modules that end at rank 0 are marked."""
    first, last = history[0][1], history[-1][1]
    top = max(1, *(max(ranks.values()) for _, ranks in history))
    columns = [
        Column("module", text=True),
        Column("first"),
        Column("over the events", text=True),
        Column("last"),
        *(Column("least", wide=True), Column("most", wide=True)),
        Column("changes", "Events at which its rank became another"),
    ]
    rows = arrange(first)

    def cells(row: Row) -> list[Cell]:
        ranks = [ranks[row.name] for _, ranks in history]
        changes = sum(a != b for a, b in pairwise(ranks))
        return [
            module(row.short, row.name),
            number(ranks[0]),
            word(rank_bars(ranks, top)),
            number(ranks[-1], marked=ranks[-1] == 0),
            *(number(min(ranks)), number(max(ranks))),
            number(changes),
        ]

    total = [word("all"), number(sum(first.values())), word(""), number(sum(last.values())), *[word("")] * 3]
    title = f"Ranks from step {history[0][0]} to {history[-1][0]}"
    return Table(title, columns, [cells(row) for row in rows], total=total, breaks=_between_types(rows))


def comparison_table(found: Comparison) -> Table:
    """Of runs that part: what each makes of the modules that they do not agree on, and how close that was."""
    assert found.did is not None
    assert found.margins is not None
    known = [f"{m:.3g}" if m is not None else "not known" for m in found.margins]
    caption = f"margin: {known[0]} in the first run and {known[1]} in the second, the least share by which a direction "
    caption += "that was taken scores above one that was not; near 0, last digits decide"
    return Table(
        f"Step {found.step}",
        [Column(name, text=True) for name in ("module", "first run", "second run")],
        [
            [word(""), *map(word, found.did)],
            *([word(m.name), word(m.first), word(m.second)] for m in found.modules),
        ],
        caption,
        breaks=frozenset({1}),
    )


# -- policies and what they mean for a model --------------------------------------------------------------------------


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
    for kind, members in _by_type(layout).items():
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


# -- parts ------------------------------------------------------------------------------------------------------------


def _groups(names: Collection[str], *, every: bool = False) -> list[tuple[Cell, list[str]]]:
    """Rows of a table by module, or by type of module where that would be too many: (label, its modules)."""
    if every or len(names) <= _MOST_ROWS:
        return [(module(row.short, row.name), [row.name]) for row in arrange(names)]
    return [
        (module(f"{rows[0].label} ({len(rows)})", kind), [row.name for row in rows])
        for kind, rows in _by_type(names).items()
    ]


def _by_type(names: Iterable[str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in arrange(names):
        found.setdefault(row.type, []).append(row)
    return found


def _between_types(rows: Sequence[Row]) -> frozenset[int]:
    """Numbers of the rows that begin another type of module."""
    return frozenset(i for i, (one, other) in enumerate(pairwise(rows), 1) if one.type != other.type)


def _marked(cell: Cell, marked: bool) -> Cell:
    return Cell(**{**vars(cell), "marked": marked})


def _figures(*values: float) -> list[Cell]:
    return [number(x, "{:.3g}") for x in values]


def _figure(value: float | None) -> Cell:
    return number(value, "{:.3g}" if value is not None and (value % 1 or value >= 1e5) else "{:.0f}")
