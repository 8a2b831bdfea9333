"""Pictures of spectra and of runs, drawn with matplotlib's objects: no global state, no window."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankflow.plans.names import Row, arrange, shortened
from rankflow.render.figure import LIGHT, Paper, new_figure, new_title, plain, save
from rankflow.render.spectra_figure import spectra_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rankflow.analysis.inspection import Inspection
    from rankflow.training.ledger import Event, Ledger

_SMALLEST = 3.6  # points of letters that can be read
_PHASES = ("#3b6fb6", "#c8553d", "#4f9d69", "#8d6ab8", "#b8892f")


def plot_spectra(inspection: Inspection, path: str | Path, *, force: bool = False) -> Path:
    """Singular values of every module as heat maps, a panel for each type, with effective ranks and noise edges.

    Raises:
        ConfigError: the path ends in no format that matplotlib writes, is there already and `force` was not given, or
            is of what was inspected.
    """
    return save(spectra_figure(inspection), path, {"the adapter": inspection.source}, force=force)


def plot_ledger(
    ledger: Ledger, path: str | Path, losses: Sequence[tuple[int, float]] = (), *, force: bool = False
) -> Path:
    """Ranks by module over the steps of a run, below the total and the phases it went through.

    With `losses`, (step, loss) in order, the loss is drawn over the total, against an axis of its own.

    Raises:
        ConfigError: the path ends in no format that matplotlib writes, is there already and `force` was not given, or
            is the ledger's own.
        CheckpointError: the ledger does not begin with an attach.
    """
    figure = ledger_figure(ledger, losses)
    return save(figure, path, {"the ledger": ledger.source}, force=force, of=source_of(ledger))


def source_of(ledger: Ledger) -> str:
    """What pictures of a run say they are of, whatever was added to its ledger since."""
    return f"rankflow run {sha256(json.dumps(ledger.events[0], sort_keys=True).encode()).hexdigest()}"


def ledger_figure(ledger: Ledger, losses: Sequence[tuple[int, float]] = (), paper: Paper = LIGHT) -> Figure:
    """
    Raises:
        CheckpointError: the ledger does not begin with an attach.
    """
    import numpy as np
    from matplotlib.cm import ScalarMappable

    history = ledger.history()
    events = ledger.events
    rows = arrange(history[0][1])
    places = _places(rows)
    begin = history[0][0]
    end = max(int(events[0].get("total_steps", 0)), *(int(e["step"]) for e in events), begin + 1)
    steps = [step for step, _ in history]
    height = _height(places)
    fig = new_figure(height + 1.9, paper)
    upper, lower = fig.subplots(2, 1, sharex=True, height_ratios=[1.5, height - 0.6])
    points = 72 * (height - 1) / (places[-1] + 1)  # of a row
    top = max(1, *(max(ranks.values()) for _, ranks in history))
    cmap, norm = _rank_colours(top, paper)
    for _, members in _by_type(rows, places):
        values = np.array([[ranks[row.name] or np.nan for _, ranks in history] for row, _ in members], dtype=float)
        edges = [place for _, place in members] + [members[-1][1] + 1]
        lower.pcolormesh([*steps, end], edges, values, norm=norm, cmap=cmap, rasterized=True)
        for place, ranks in _last(members, history[-1][1], by_row=points >= _SMALLEST):
            size = min(7.0, points) if points >= _SMALLEST else 7.0
            lower.text(end, place, f" {ranks}", va="center", fontsize=size, color=paper.ink, clip_on=False)
    lower.set_xlim(begin, end)
    lower.set_xlabel("optimizer step", fontsize=9, color=paper.ink)
    _label_rows(lower, rows, places, paper)
    lower.text(end, -0.15, " last", va="bottom", fontsize=7, color=paper.faint, clip_on=False)
    totals = [sum(ranks.values()) for _, ranks in history]
    upper.step([*steps, end], [*totals, totals[-1]], where="post", color=paper.ink, linewidth=1.6)
    upper.set_ylim(0, max(totals) * 1.25)
    upper.set_ylabel("total rank", fontsize=9, color=paper.ink)
    upper.tick_params(labelsize=8, colors=paper.ink)
    upper.spines[["top", "right"]].set_visible(False)
    upper.spines[["bottom", "left"]].set_color(paper.faint)
    for ax in (upper, lower):
        ax.set_facecolor(paper.ground)
    _mark_phases(upper, lower, events, end, paper)
    _mark_events(upper, events, paper)
    if losses:
        _draw_losses(upper, losses)
    changes = sum(e["event"] == "resize" for e in events)
    new_title(
        upper,
        "Ranks over the run",
        f"{len(rows)} modules, {changes} resizes, total {totals[0]} to {totals[-1]}",
        paper,
    )
    bar = fig.colorbar(
        ScalarMappable(norm, cmap),
        ax=[upper, lower],
        pad=0.05,
        fraction=0.04,
        shrink=min(0.8, 3.0 / fig.get_figheight()),
        aspect=14,
        anchor=(0.0, 1.0),
    )
    bar.set_label("rank", color=paper.ink)
    _whole_ticks(bar, top, paper)
    return fig


# -- parts ----------------------------------------------------------------------------------------------------------


def _places(rows: Sequence[Row]) -> list[float]:
    """Upper edge of every row, types kept apart."""
    places, at, gap = [], 0.0, max(0.6, len(rows) / 120)
    for i, row in enumerate(rows):
        at += gap if i and row.type != rows[i - 1].type else 0.0
        places.append(at)
        at += 1.0
    return places


def _height(places: Sequence[float]) -> float:
    """Inches that rows ask for, within what a screen can show."""
    return min(16.0, max(3.0, 1.4 + 0.16 * (places[-1] + 1)))


def _by_type(rows: Sequence[Row], places: Sequence[float]) -> Iterator[tuple[str, list[tuple[Row, float]]]]:
    for kind, members in groupby(zip(rows, places, strict=True), key=lambda pair: pair[0].type):
        yield kind, list(members)


def _last(
    members: Sequence[tuple[Row, float]], ranks: Mapping[str, int], *, by_row: bool
) -> Iterator[tuple[float, str]]:
    """The column at the right: (place, last rank), of every row or the least and the most of a type."""
    if by_row:
        yield from ((place + 0.5, str(ranks[row.name])) for row, place in members)
        return
    found = [ranks[row.name] for row, _ in members]
    low, high = min(found), max(found)
    yield (members[0][1] + members[-1][1] + 1) / 2, str(low) if low == high else f"{low} to {high}"


def _label_rows(ax: Axes, rows: Sequence[Row], places: Sequence[float], paper: Paper) -> None:
    """Types at the left, layers between them and the picture where there is room."""
    ax.set_ylim(places[-1] + 1, 0)
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.tick_params(axis="x", colors=paper.ink, labelsize=8)
    beside = ax.get_yaxis_transform()

    def write(x: float, y: float, text: str, size: float, colour: str) -> None:
        ax.text(
            x, y, plain(text), fontsize=size, color=colour, transform=beside, va="center", ha="right", clip_on=False
        )

    for kind, members in _by_type(rows, places):
        first, last = members[0][1], members[-1][1] + 1
        layered = len(members) > 1 or members[0][0].layer
        inches = (last - first) / (places[-1] + 1) * _height(places)
        if (size := min(8.5, 60 * inches)) >= _SMALLEST:
            write(-0.06 if layered else -0.01, (first + last) / 2, shortened(kind, 36), size, paper.ink)
        if not layered:
            continue
        every = max(1, math.ceil(len(members) / min(12, max(1, inches / 0.12))))
        for i, (row, place) in enumerate(members):
            if i % every == 0:
                write(-0.008, place + 0.5, row.layer, 6, paper.faint)
        ax.plot(
            [-0.045, -0.045],
            [first + 0.1, last - 0.1],
            color=paper.faint,
            linewidth=0.8,
            transform=beside,
            clip_on=False,
        )


def _rank_colours(top: int, paper: Paper) -> tuple[Any, Any]:
    """One colour a rank while they can be told apart."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, Normalize

    cmap = colormaps["viridis"].with_extremes(bad=paper.absent)
    if top > 16:
        return cmap, Normalize(0, top)
    return cmap.resampled(top).with_extremes(bad=paper.absent), BoundaryNorm([r + 0.5 for r in range(top + 1)], top)


def _whole_ticks(bar: Any, top: int, paper: Paper) -> None:
    every = max(1, math.ceil(top / 10))
    bar.set_ticks(list(range(every, top + 1, every)))
    bar.ax.tick_params(labelsize=8, length=2, colors=paper.ink)
    bar.outline.set_visible(False)


def _mark_phases(upper: Axes, lower: Axes, events: Sequence[Event], end: int, paper: Paper) -> None:
    phases = [e for e in events if e["event"] == "phase"]
    for i, phase in enumerate(phases):
        last = phases[i + 1]["step"] if i + 1 < len(phases) else end
        colour = _PHASES[i % len(_PHASES)]
        upper.axvspan(phase["step"], last, color=colour, alpha=0.12, linewidth=0)
        upper.text(
            (phase["step"] + last) / 2,
            0.93,
            plain(phase["policy"]),
            transform=upper.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=9,
            color=colour,
            fontweight="bold",
        )
        if i:
            for ax, ink in ((upper, paper.ink), (lower, "white")):
                ax.axvline(phase["step"], color=ink, linewidth=0.9, linestyle=(0, (3, 3)))


def _draw_losses(ax: Axes, losses: Sequence[tuple[int, float]]) -> None:
    twin = ax.twinx()
    twin.plot([step for step, _ in losses], [loss for _, loss in losses], color=_PHASES[1], linewidth=1.4)
    low, high = min(0.0, *(loss for _, loss in losses)), max(loss for _, loss in losses)
    twin.set_ylim(1.25 * low, high + 0.25 * (high - low) if high > low else None)
    twin.set_ylabel("loss", fontsize=9, color=_PHASES[1])
    twin.tick_params(labelsize=8, colors=_PHASES[1])
    twin.spines[["top", "left"]].set_visible(False)


def _mark_events(ax: Axes, events: Sequence[Event], paper: Paper) -> None:
    """Ticks along the foot of the picture: resizes, and decisions that were due and not taken."""
    for kind, mark, colour, label in (
        ("resize", 6, paper.ink, "resize"),
        ("skip", "x", _PHASES[1], "decision skipped"),
    ):
        steps = [e["step"] for e in events if e["event"] == kind]
        if steps:
            ax.plot(
                steps,
                [0.04] * len(steps),
                linestyle="none",
                marker=mark,
                color=colour,
                markersize=5,
                transform=ax.get_xaxis_transform(),
                clip_on=False,
                label=label,
                zorder=3,
            )
    if ax.get_legend_handles_labels()[0]:
        ax.legend(
            loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=8, labelcolor=paper.ink
        )
