"""What the HTML reports of an adapter, of a squeeze and of a run say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from rankflow.plans.names import arrange
from rankflow.render.html import Cell, Column, Fact, Page, Picture, Section, curve, number, share, word
from rankflow.render.run_figure import ledger_figure
from rankflow.render.spectra_figure import spectra_figure
from rankflow.render.tables import intruders_mean

if TYPE_CHECKING:
    from rankflow.analysis.inspection import InspectedModule, Inspection
    from rankflow.compress.report import SqueezeReport
    from rankflow.training.ledger import Event, Ledger

_FOOTER = "Written by rankflow. This file is complete in itself; click a heading to sort by it."
_EFFECTIVE = Column("effective", "Effective rank: exp of the entropy of the singular values over their sum")
_STABLE = Column("stable", "Stable rank: sum of squared singular values over the largest square")
_ABOVE = Column("above noise", "Singular values above the noise threshold; the rank that squeeze --auto gives")


def inspection_page(found: Inspection) -> Page:
    """An adapter: its types of modules, the picture of its spectra, its modules."""
    facts = [
        Fact("modules", f"{len(found.modules):,}"),
        Fact("parameters", f"{found.params:,}"),
        Fact("of factors", decimal(found.bytes)),
        Fact("total rank", f"{sum(m.rank for m in found.modules):,}"),
        Fact("effective", f"{sum(m.rank_effective for m in found.modules):,.0f}"),
        Fact("above noise", f"{sum(m.rank_above_noise for m in found.modules):,}"),
    ]
    if found.base is not None:
        facts.append(Fact("intruders", f"{sum(len(m.intruders.found) for m in found.modules if m.intruders):,}"))
    picture = Picture.of(
        lambda paper: spectra_figure(found, paper, titled=False), "Heat maps of the singular values of every module"
    )
    sections = [
        Section("By type of module", "Means over the modules of a type.", None, *_types(found)),
        Section(
            "Spectra",
            "Singular values of ΔW, by layer (down) and direction (across). Cyan: effective rank; white: how many are "
            "above the noise; grey: beyond the rank.",
            picture,
        ),
        Section("Modules", _modules_about(found), None, *_modules(found)),
        *_carried(found.carried),
    ]
    return Page(_named(found.source), f"LoRA adapter, {found.source}", facts, sections, found.notes, _FOOTER)


def squeeze_page(done: SqueezeReport) -> Page:
    """A squeeze: what became of every module."""
    facts = [
        Fact("rank before", f"{sum(m.rank_before for m in done.modules):,}"),
        Fact("rank after", f"{sum(m.rank_after for m in done.modules):,}"),
        Fact("parameters after", f"{done.params_after:,}"),
        Fact("factors before", decimal(done.bytes_before)),
        Fact("factors after", decimal(done.bytes_after)),
        Fact("energy kept", f"{done.energy_kept:.2%}"),
        Fact("weight error", f"{done.weight_error:.2%}"),
    ]
    columns = [
        Column("module", text=True),
        Column("rank before"),
        Column("rank after"),
        Column("energy kept", "Share of the squared singular values, in the metric, that is left"),
        Column("error", "Relative error in the metric"),
        Column("weight error", "Relative error of ΔW"),
        Column("parameters"),
        Column("metric", text=True),
    ]
    modules = {m.name: m for m in done.modules}
    rows = [
        (
            word(row.short, row.name),
            number(m.rank_before),
            number(m.rank_after),
            share(m.energy_kept),
            number(m.relative_error, "{:.2%}"),
            number(m.weight_error, "{:.2%}"),
            number(m.params_after),
            word(m.metric),
        )
        for row in arrange(modules)
        if (m := modules[row.name])
    ]
    target = ", ".join(f"{key} {value}" for key, value in done.target.items())
    about = f"Squeezed from {done.source}: {target}; metric {done.metric}"
    title = _named(done.out or done.source)
    sections = [Section("Modules", "", None, columns, rows), *_carried(done.carried)]
    return Page(title, about, facts, sections, done.notes, _FOOTER)


def run_page(ledger: Ledger, source: str) -> Page:
    """A run: the picture of its ranks, its events, its modules.

    Raises:
        CheckpointError: the ledger does not begin with an attach.
    """
    history, events = ledger.history(), ledger.events
    first, last = history[0][1], history[-1][1]
    facts = [
        Fact("modules", f"{len(first):,}"),
        Fact("steps", f"{max(int(e['step']) for e in events):,}"),
        Fact("resizes", f"{sum(e['event'] == 'resize' for e in events):,}"),
        Fact("decisions skipped", f"{sum(e['event'] == 'skip' for e in events):,}"),
        Fact("total rank at first", f"{sum(first.values()):,}"),
        Fact("total rank at last", f"{sum(last.values()):,}"),
    ]
    picture = Picture.of(lambda paper: ledger_figure(ledger, paper=paper), "The rank of every module over the steps")
    gates = [
        Section(f"Gates of {fold['policy']}, folded at step {fold['step']}", "What they came to.", None, *_gates(fold))
        for fold in events
        if fold["event"] == "fold" and fold["gates"]
    ]
    sections = [
        Section("Ranks", "", picture),
        Section("Events", "What happened when, and why.", None, *_events(events)),
        *gates,
        Section("Modules", "Their ranks from the first step to the last.", None, *_ranks(history)),
    ]
    return Page(_named(source), f"Run, as its ledger tells it: {source}", facts, sections, (), _FOOTER)


# -- parts ----------------------------------------------------------------------------------------------------------

Table = tuple[Sequence[Column], Sequence[Sequence[Cell]]]


def _carried(carried: Mapping[str, int]) -> list[Section]:
    """Tensors that are no factors, if there are any."""
    if not carried:
        return []
    about = f"Tensors that are no factors, {decimal(sum(carried.values()))} in all: a squeeze keeps them as they are."
    rows = [(word(name), number(size)) for name, size in carried.items()]
    return [Section("Carried along", about, None, [Column("tensor", text=True), Column("bytes")], rows)]


def _named(path: str) -> str:
    return Path(path).resolve().name or path


def _energies(ks: Iterable[int]) -> list[Column]:
    return [Column(f"E{k}", f"Energy: share of the squared singular values in the {k} largest") for k in ks]


def _intruders_column(found: Inspection) -> list[Column]:
    return [Column("intruders", f"Intruders: {intruders_mean(found)}")] if found.base else []


def _types(found: Inspection) -> Table:
    energies = _energies(found.types[0].energy if found.types else ())
    columns = [
        Column("type", text=True),
        Column("modules"),
        Column("rank"),
        Column("least"),
        Column("most"),
        *(_EFFECTIVE, _STABLE, _ABOVE),
        *_intruders_column(found),
        *energies,
        Column("share of energy", "Of the squared singular values of the whole adapter"),
    ]
    rows = [
        (
            word(t.type),
            number(t.modules),
            number(t.rank, "{:.1f}"),
            number(t.rank_min),
            number(t.rank_max),
            *(number(x, "{:.1f}") for x in (t.rank_effective, t.rank_stable, t.rank_above_noise)),
            *([number(t.intruders)] if found.base else []),
            *(number(energy, "{:.0%}") for energy in t.energy.values()),
            share(t.energy_share),
        )
        for t in found.types
    ]
    return columns, rows


def _modules_about(found: Inspection) -> str:
    about = "Bars: logarithms of the singular values over three decades, with the noise threshold as a line."
    return f"{about} Intruders: {intruders_mean(found)}." if found.base else about


def _modules(found: Inspection) -> Table:
    measured = any(m.tokens is not None for m in found.modules)
    columns = [
        Column("module", text=True),
        Column("rank"),
        *(_EFFECTIVE, _STABLE),
        Column("noise threshold", "The largest singular value that noise of the size of the median one has"),
        _ABOVE,
        *_intruders_column(found),
        Column("largest", "The largest singular value"),
        Column("spectrum", "Sorted by the largest singular value"),
        *_energies(found.modules[0].energy),
        Column("shape", "Parameters sort it"),
        *([Column("tokens", "That the direction measured least was measured over")] if measured else []),
        *(Column(f"effective in {k}", f"Effective rank of the spectrum in metric {k}") for k in found.metrics),
    ]
    modules = {m.name: m for m in found.modules}
    top = max(m.sigma[0] for m in found.modules)

    def row(short: str, m: InspectedModule) -> tuple[Cell, ...]:
        in_metrics = (m.metrics[k].rank_effective if k in m.metrics else None for k in found.metrics)
        return (
            word(short, m.name),
            number(m.rank),
            *(number(x, "{:.1f}") for x in (m.rank_effective, m.rank_stable)),
            number(m.noise_threshold, "{:.3g}"),
            number(m.rank_above_noise),
            *([number(None if m.intruders is None else len(m.intruders.found))] if found.base else []),
            number(m.sigma[0], "{:.3g}"),
            curve(m.sigma, top, m.noise_threshold),
            *(number(energy, "{:.0%}") for energy in m.energy.values()),
            Cell(f"{m.out_features} x {m.in_features}", value=m.params),
            *([number(m.tokens)] if measured else []),
            *(number(x, "{:.1f}") for x in in_metrics),
        )

    return columns, [row(r.short, modules[r.name]) for r in arrange(modules)]


def _events(events: Sequence[Event]) -> Table:
    columns = [
        Column("step"),
        Column("event", text=True),
        Column("policy", text=True),
        Column("modules", "How many were resized"),
        Column("total rank"),
        Column("why", text=True),
    ]
    rows = [
        (
            number(int(e["step"])),
            word(str(e["event"])),
            word(str(e.get("policy", ""))),
            number(len(e["ranks"]) if e.get("ranks") else None),
            number(e.get("total_rank")),
            word(str(e.get("reason", "")) or ", ".join(map(str, e.get("notes", []))), long=True),
        )
        for e in events
    ]
    return columns, rows


def _gates(fold: Event) -> Table:
    reports: Mapping[str, Mapping[str, Any]] = fold["gates"]
    keys = list(dict.fromkeys(key for report in reports.values() for key in report))
    columns = [Column("module", text=True), *(Column(key.replace("_", " ")) for key in keys)]
    rows = [
        (word(row.short, row.name), *(number(reports[row.name].get(key), "{:.4g}") for key in keys))
        for row in arrange(reports)
    ]
    return columns, rows


def _ranks(history: Sequence[tuple[int, Mapping[str, int]]]) -> Table:
    columns = [
        *(Column("module", text=True), Column("first"), Column("last"), Column("least"), Column("most")),
        Column("changes", "Events at which its rank became another"),
    ]
    rows = []
    for row in arrange(history[0][1]):
        ranks = [ranks[row.name] for _, ranks in history]
        changes = sum(a != b for a, b in pairwise(ranks))
        numbers = (ranks[0], ranks[-1], min(ranks), max(ranks), changes)
        rows.append((word(row.short, row.name), *map(number, numbers)))
    return columns, rows
