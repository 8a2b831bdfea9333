"""Tables about saved adapters: squeezes, inspections, differences, what engines get wrong."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.filesize import decimal

from rankflow.linalg.spectrum import relative
from rankflow.plans.names import Row, arrange, by_type, shown
from rankflow.render.table import (
    Cell,
    Column,
    Table,
    between_types,
    curve,
    module,
    number,
    share,
    span,
    word,
)

if TYPE_CHECKING:
    from rankflow.analysis.difference import Difference
    from rankflow.analysis.inspection import Inspection
    from rankflow.analysis.intruders import Intruders
    from rankflow.compress.accept import Trial
    from rankflow.compress.report import SqueezeReport
    from rankflow.serving.verdicts import Verdict

_MOST_ROWS = 48  # a table longer than this is summed up by type of module
_MOST_NAMES = 4
_LITTLE = 0.9  # energy kept below this share is marked
_EFFECTIVE = Column("effective", "Effective rank: exp of the entropy of the singular values over their sum")
_STABLE = Column("stable", "Stable rank: sum of squared singular values over the largest square")
_ABOVE = Column("above noise", "Singular values above the noise threshold; the rank that squeeze --auto gives")


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
                replace(one, marked=min(m.energy_kept for m in found) < _LITTLE),
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
        Column(
            "noise threshold", "The largest singular value that noise of the size of the median one has", spared=True
        ),
        _ABOVE,
        *_intruders_column(inspection),
        Column("largest", "The largest singular value"),
        Column("spectrum", "Sorted by the largest singular value"),
        *_energies(inspection.modules[0].energy),
        Column("shape", "Parameters sort it", wide=True),
        *([Column("tokens", "That the direction measured least was measured over")] if measured else []),
        *(
            Column(f"effective in {k}", f"Effective rank of the spectrum in metric {k}", spared=True)
            for k in inspection.metrics
        ),
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
    return Table(title, columns, [cells(row) for row in rows], _means(columns), breaks=between_types(rows))


def types_table(inspection: Inspection) -> Table:
    """The modules of an adapter summed up by type."""
    columns = [
        Column("type", text=True),
        Column("modules"),
        Column("rank"),
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
    means = "Energy: share of the squared singular values in the {} largest"
    return [Column(f"E{k}", means.format(k), spared=True) for k in ks]


def _means(columns: Sequence[Column]) -> str:
    """What the headings on a terminal stand for."""
    told = {c.name: c.means for c in columns if c.means and not c.wide and not c.name.startswith("E")}
    told = {name: means.partition(": ")[2] or means[0].lower() + means[1:] for name, means in told.items()}
    energy = "Ek: share of the squared singular values in the k largest"
    return "; ".join([*(f"{name}: {means}" for name, means in told.items()), energy])


def _groups(names: Collection[str], *, every: bool = False) -> list[tuple[Cell, list[str]]]:
    """Rows of a table by module, or by type of module where that would be too many: (label, its modules)."""
    if every or len(names) <= _MOST_ROWS:
        return [(module(row.short, row.name), [row.name]) for row in arrange(names)]
    return [
        (module(f"{rows[0].label} ({len(rows)})", kind), [row.name for row in rows])
        for kind, rows in by_type(names).items()
    ]


def _figures(*values: float) -> list[Cell]:
    return [number(x, "{:.3g}") for x in values]
