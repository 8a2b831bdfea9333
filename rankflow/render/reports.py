"""What the HTML reports of an adapter, of a squeeze and of a run say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal

from rankflow.render.adapter_tables import carried_table, inspection_table, intruders_mean, squeeze_table, types_table
from rankflow.render.html import Fact, Page, Picture, Section
from rankflow.render.run_figure import ledger_figure
from rankflow.render.run_tables import events_table, gates_table, ranks_table
from rankflow.render.spectra_figure import spectra_figure

if TYPE_CHECKING:
    from rankflow.analysis.inspection import Inspection
    from rankflow.compress.report import SqueezeReport
    from rankflow.training.ledger import Ledger

_FOOTER = "Written by rankflow. This file is complete in itself; click a heading to sort by it."


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
        Section("By type of module", "Means over the modules of a type.", None, types_table(found)),
        Section(
            "Spectra",
            "Singular values of ΔW, by layer (down) and direction (across). Cyan: effective rank; white: how many are "
            "above the noise; grey: beyond the rank.",
            picture,
        ),
        Section("Modules", _modules_about(found), None, inspection_table(found)),
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
    target = ", ".join(f"{key} {value}" for key, value in done.target.items())
    about = f"Squeezed from {done.source}: {target}; metric {done.metric}"
    title = _named(done.out or done.source)
    sections = [Section("Modules", "", None, squeeze_table(done, every=True)), *_carried(done.carried)]
    return Page(title, about, facts, sections, done.notes, _FOOTER)


def run_page(ledger: Ledger, source: str, losses: Sequence[tuple[int, float]] = ()) -> Page:
    """A run: the picture of its ranks, and of its losses where they are given; its events, its modules.

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
    picture = Picture.of(lambda paper: ledger_figure(ledger, losses, paper), "The rank of every module over the steps")
    gates = [
        Section(table.title, "What they came to.", None, table)
        for table in (gates_table(e) for e in events if e["event"] == "fold" and e["gates"])
    ]
    sections = [
        Section("Ranks", "", picture),
        Section("Events", "What happened when, and why.", None, events_table(events)),
        *gates,
        Section("Modules", "Their ranks from the first step to the last.", None, ranks_table(history)),
    ]
    return Page(_named(source), f"Run, as its ledger tells it: {source}", facts, sections, (), _FOOTER)


# -- parts ------------------------------------------------------------------------------------------------------------


def _carried(carried: Mapping[str, int]) -> list[Section]:
    """Tensors that are no factors, if there are any."""
    if not carried:
        return []
    about = f"Tensors that are no factors, {decimal(sum(carried.values()))} in all: a squeeze keeps them as they are."
    return [Section("Carried along", about, None, carried_table(carried))]


def _named(path: str) -> str:
    return Path(path).resolve().name or path


def _modules_about(found: Inspection) -> str:
    about = "Bars: logarithms of the singular values over three decades, with the noise threshold as a line."
    return f"{about} Intruders: {intruders_mean(found)}." if found.base else about
