"""Pictures of spectra and of runs, drawn with matplotlib's objects: no global state, no window."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankflow.errors import ConfigError
from rankflow.names import Row, arrange

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rankflow.inspection import Inspection
    from rankflow.ledger import Event, Ledger

_INK, _FAINT, _ABSENT = "#222222", "#8a8a8a", "#e9e9e9"
_PHASES = ("#3b6fb6", "#c8553d", "#4f9d69", "#8d6ab8", "#b8892f")


def plot_spectra(inspection: Inspection, path: str | Path) -> Path:
    """Singular values of every module as a heat map, with each module's effective rank on it.

    Raises:
        ConfigError: the path ends in no format that matplotlib writes.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    modules = {m.name: m for m in inspection.modules}
    rows = arrange(modules)
    places = _places(rows)
    width = max(m.rank for m in inspection.modules)
    top = max((s for m in inspection.modules for s in m.sigma), default=0.0) or 1.0
    fig = _figure(_height(places))
    ax = fig.add_subplot()
    norm, cmap = LogNorm(top * 1e-3, top), colormaps["magma"].with_extremes(bad=_ABSENT)
    for _, members in _by_type(rows, places):
        values = np.full((len(members), width), np.nan)
        for i, (row, _) in enumerate(members):
            values[i, : modules[row.name].rank] = np.maximum(modules[row.name].sigma, top * 1e-3)
        edges = [place for _, place in members] + [members[-1][1] + 1]
        ax.pcolormesh(np.arange(width + 1) + 0.5, edges, values, norm=norm, cmap=cmap, rasterized=True)
    effective = [modules[row.name].rank_effective for row in rows]
    ax.plot(
        [e + 0.5 for e in effective],
        [p + 0.5 for p in places],
        "|",
        color="#39d0d8",
        markersize=_marker(fig, places),
        markeredgewidth=2.2,
        label="effective rank",
    )
    ax.set_xlim(0.5, width + 0.5)
    ax.set_xlabel("singular direction", fontsize=9)
    _label_rows(ax, rows, places)
    _title(ax, f"Spectra of {Path(inspection.source).resolve().name}", _summary(inspection))
    fig.colorbar(
        ScalarMappable(norm, cmap),
        ax=ax,
        label="singular value of ΔW",
        pad=0.02,
        fraction=0.05,
        extend="min",
    )
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    return _save(fig, path)


def plot_ledger(ledger: Ledger, path: str | Path, losses: Sequence[tuple[int, float]] = ()) -> Path:
    """Ranks by module over the steps of a run, below the total and the phases it went through.

    With `losses`, (step, loss) in order, the loss is drawn over the total, against an axis of its own.

    Raises:
        ConfigError: the path ends in no format that matplotlib writes.
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
    fig = _figure(height + 1.9)
    upper, lower = fig.subplots(2, 1, sharex=True, height_ratios=[1.5, height - 0.6])
    numbered = len(rows) <= 60
    top = max(1, *(max(ranks.values()) for _, ranks in history))
    cmap, norm = _rank_colours(top)
    for _, members in _by_type(rows, places):
        values = np.array([[ranks[row.name] or np.nan for _, ranks in history] for row, _ in members], dtype=float)
        edges = [place for _, place in members] + [members[-1][1] + 1]
        lower.pcolormesh([*steps, end], edges, values, norm=norm, cmap=cmap, rasterized=True)
        if numbered:
            for row, place in members:
                lower.text(
                    end, place + 0.5, f" {history[-1][1][row.name]}", va="center", fontsize=7, color=_INK, clip_on=False
                )
    lower.set_xlim(begin, end)
    lower.set_xlabel("optimizer step", fontsize=9)
    _label_rows(lower, rows, places)
    if numbered:
        lower.text(end, -0.15, " last", va="bottom", fontsize=7, color=_FAINT, clip_on=False)
    totals = [sum(ranks.values()) for _, ranks in history]
    upper.step([*steps, end], [*totals, totals[-1]], where="post", color=_INK, linewidth=1.6)
    upper.set_ylim(0, max(totals) * 1.25)
    upper.set_ylabel("total rank", fontsize=9)
    upper.tick_params(labelsize=8)
    upper.spines[["top", "right"]].set_visible(False)
    _mark_phases(upper, lower, events, end)
    _mark_events(upper, events)
    if losses:
        _draw_losses(upper, losses)
    changes = sum(e["event"] == "resize" for e in events)
    _title(upper, "Ranks over the run", f"{len(rows)} modules, {changes} resizes, total {totals[0]} to {totals[-1]}")
    bar = fig.colorbar(ScalarMappable(norm, cmap), ax=[upper, lower], label="rank", pad=0.05, fraction=0.04, shrink=0.8)
    _whole_ticks(bar, top)
    return _save(fig, path)


# -- parts ----------------------------------------------------------------------------------------------------------


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(10.5, height), dpi=150, layout="constrained")


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


def _marker(fig: Figure, places: Sequence[float]) -> float:
    """Points that a marker may have to fill one row."""
    return max(2.0, min(9.0, (fig.get_figheight() - 1.4) * 72 / (places[-1] + 1) * 0.8))


def _by_type(rows: Sequence[Row], places: Sequence[float]) -> Iterator[tuple[str, list[tuple[Row, float]]]]:
    for kind, members in groupby(zip(rows, places, strict=True), key=lambda pair: pair[0].type):
        yield kind, list(members)


def _label_rows(ax: Axes, rows: Sequence[Row], places: Sequence[float]) -> None:
    """Types at the left, layers between them and the picture where there is room."""
    ax.set_ylim(places[-1] + 1, 0)
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.tick_params(axis="x", colors=_INK, labelsize=8)
    beside = ax.get_yaxis_transform()

    def write(x: float, y: float, text: str, size: float, colour: str) -> None:
        ax.text(x, y, text, fontsize=size, color=colour, transform=beside, va="center", ha="right", clip_on=False)

    for kind, members in _by_type(rows, places):
        first, last = members[0][1], members[-1][1] + 1
        layered = len(members) > 1 or members[0][0].layer
        write(-0.06 if layered else -0.01, (first + last) / 2, kind, 8.5, _INK)
        if not layered:
            continue
        every = max(1, math.ceil(len(members) / 12))
        for i, (row, place) in enumerate(members):
            if i % every == 0:
                write(-0.008, place + 0.5, row.layer, 6, _FAINT)
        ax.plot(
            [-0.045, -0.045],
            [first + 0.1, last - 0.1],
            color=_FAINT,
            linewidth=0.8,
            transform=beside,
            clip_on=False,
        )


def _title(ax: Axes, title: str, under: str) -> None:
    ax.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK, pad=20)
    ax.annotate(
        under, (0, 1), xytext=(0, 7), xycoords="axes fraction", textcoords="offset points", fontsize=9, color=_FAINT
    )


def _summary(inspection: Inspection) -> str:
    ranks = sum(m.rank for m in inspection.modules)
    effective = sum(m.rank_effective for m in inspection.modules)
    return (
        f"{len(inspection.modules)} modules, {inspection.params:,} parameters; "
        f"total rank {ranks}, effective {effective:.0f}; grey: beyond its rank"
    )


def _rank_colours(top: int) -> tuple[Any, Any]:
    """One colour a rank while they can be told apart."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, Normalize

    cmap = colormaps["viridis"].with_extremes(bad=_ABSENT)
    if top > 16:
        return cmap, Normalize(0, top)
    return cmap.resampled(top).with_extremes(bad=_ABSENT), BoundaryNorm([r + 0.5 for r in range(top + 1)], top)


def _whole_ticks(bar: Any, top: int) -> None:
    every = max(1, math.ceil(top / 10))
    bar.set_ticks(list(range(every, top + 1, every)))
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)


def _mark_phases(upper: Axes, lower: Axes, events: Sequence[Event], end: int) -> None:
    phases = [e for e in events if e["event"] == "phase"]
    for i, phase in enumerate(phases):
        last = phases[i + 1]["step"] if i + 1 < len(phases) else end
        colour = _PHASES[i % len(_PHASES)]
        upper.axvspan(phase["step"], last, color=colour, alpha=0.12, linewidth=0)
        upper.text(
            (phase["step"] + last) / 2,
            0.93,
            phase["policy"],
            transform=upper.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=9,
            color=colour,
            fontweight="bold",
        )
        if i:
            for ax, ink in ((upper, _INK), (lower, "white")):
                ax.axvline(phase["step"], color=ink, linewidth=0.9, linestyle=(0, (3, 3)))


def _draw_losses(ax: Axes, losses: Sequence[tuple[int, float]]) -> None:
    twin = ax.twinx()
    twin.plot([step for step, _ in losses], [loss for _, loss in losses], color=_PHASES[1], linewidth=1.4)
    twin.set_ylim(0, 1.25 * max(loss for _, loss in losses))
    twin.set_ylabel("loss", fontsize=9, color=_PHASES[1])
    twin.tick_params(labelsize=8, colors=_PHASES[1])
    twin.spines[["top", "left"]].set_visible(False)


def _mark_events(ax: Axes, events: Sequence[Event]) -> None:
    """Ticks along the foot of the picture: resizes, and decisions that were due and not taken."""
    for kind, mark, colour, label in (("resize", 6, _INK, "resize"), ("skip", "x", _PHASES[1], "decision skipped")):
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
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=8)


def _save(fig: Figure, path: str | Path) -> Path:
    path = Path(path)
    kinds = fig.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in kinds:
        raise ConfigError(f"{path}: a picture is one of {', '.join(sorted(kinds))}, by the end of its name")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        fig.savefig(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
