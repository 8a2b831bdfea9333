"""The picture of an adapter's spectra: a panel for every type of module, a row for every layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rankflow.plans.names import Row, arrange, shortened
from rankflow.render.figure import LIGHT, Paper, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rankflow.analysis.inspection import InspectedModule, Inspection

_ACROSS = 4  # panels side by side, at most
_MOST_TYPES = 20  # of modules that have panels of their own
_HIGHEST = 7.0  # inches of a panel
_BAR = 2.2  # inches of the bar of colours
_DECADES = 3  # of singular values that colours tell apart
_EFFECTIVE, _EDGE = "#39d0d8", "#ffffff"


def spectra_figure(inspection: Inspection, paper: Paper = LIGHT, *, titled: bool = True) -> Figure:
    """Singular values of every module as heat maps, with its effective rank and its noise threshold on them; `titled`
    with what it shows."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    modules = {m.name: m for m in inspection.modules}
    rows = arrange(modules)
    blocks = _by_block(rows)
    by_block = len({row.type for row in rows}) > _MOST_TYPES >= 2 * len(blocks)
    panels = blocks if by_block else _by_type(rows)
    width = max(m.rank for m in inspection.modules)
    top = max((s for m in inspection.modules for s in m.sigma), default=0.0) or 1.0
    norm = LogNorm(top * 10.0**-_DECADES, top)
    cmap = colormaps["magma"].with_extremes(bad=paper.absent)

    across = min(_ACROSS, len(panels))
    lines = [panels[i : i + across] for i in range(0, len(panels), across)]
    heights = [_inches(max(len(rows) for _, rows in line)) for line in lines]
    fig = new_figure(1.25 + sum(heights) + 0.42 * len(lines), paper)
    axes = fig.subplots(len(lines), across, squeeze=False, sharex=True, height_ratios=heights)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for i, (title, rows) in enumerate(panels):
        ax: Axes = axes.flat[i]
        height = _inches(len(rows)) / heights[i // across]
        _draw(ax, [modules[row.name] for row in rows], width, norm, cmap)
        ax.set_ylim(len(rows) / height, 0)  # rows are as high in all panels of a line
        _label(ax, title, paper)
        if by_block:
            _label_types(ax, title, rows, paper)
        else:
            _label_layers(ax, rows, paper)
        below = i + across >= len(panels)
        ax.tick_params(axis="x", colors=paper.faint, labelsize=7, length=2, labelbottom=below, bottom=below)
    if titled:
        name = Path(inspection.source).resolve().name
        fig.suptitle(
            f"Spectra of {plain(shortened(name, 60))}",
            x=0.01,
            ha="left",
            fontsize=12,
            fontweight="bold",
            color=paper.ink,
        )
        fig.supxlabel(_summary(inspection), fontsize=8.5, color=paper.faint, x=0.01, ha="left")
    bar = fig.colorbar(
        ScalarMappable(norm, cmap),
        ax=axes,
        pad=0.015,
        fraction=0.03,
        shrink=min(1.0, _BAR / fig.get_figheight()),
        aspect=14,
        anchor=(0.0, 1.0),
        extend="min",
        extendfrac=0.05,
    )
    bar.set_label("singular value of ΔW", fontsize=8.5, color=paper.ink)
    bar.ax.tick_params(which="both", colors=paper.faint, labelsize=7, length=2)
    bar.outline.set_visible(False)
    return fig


# -- parts ----------------------------------------------------------------------------------------------------------


def _by_block(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """(heading, rows): a panel for each block of a model that has many types of modules."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.block, []).append(row)
    return list(found.items())


def _by_type(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """(heading, rows): a panel for each type; where most types have but one module, those share one."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.label, []).append(row)
    single = [label for label, members in found.items() if len(members) == 1]
    if len(single) <= 2 * _ACROSS:
        return list(found.items())
    rest = [found.pop(label)[0] for label in single]
    return [*found.items(), ("one of a kind", rest)]


def _inches(rows: int) -> float:
    return min(_HIGHEST, max(0.5, rows * (0.16 if rows <= 16 else 0.1)))


def _draw(ax: Axes, modules: Sequence[InspectedModule], width: int, norm: object, cmap: object) -> None:
    import numpy as np

    values = np.full((len(modules), width), np.nan)
    least = norm.vmin  # type: ignore[attr-defined]
    for i, m in enumerate(modules):
        values[i, : m.rank] = np.maximum(m.sigma, least)
    edges = np.arange(width + 1) + 0.5, np.arange(len(modules) + 1)
    ax.pcolormesh(*edges, values, norm=norm, cmap=cmap, rasterized=True)  # type: ignore[arg-type]
    for found, colour, thick in (
        ([m.rank_above_noise for m in modules], _EDGE, 1.0),
        ([m.rank_effective for m in modules], _EFFECTIVE, 1.8),
    ):
        at = np.array(found) + 0.5
        ax.vlines(at, np.arange(len(modules)) + 0.06, np.arange(len(modules)) + 0.94, color=colour, linewidth=thick)
    ax.set_xlim(0.5, width + 0.5)


def _label(ax: Axes, title: str, paper: Paper) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_title(plain(shortened(title, 28)), loc="left", fontsize=8.5, color=paper.ink, pad=3)
    ax.tick_params(axis="y", length=0, pad=2)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    ax.spines[:].set_visible(False)
    ax.patch.set_alpha(0)


def _label_layers(ax: Axes, rows: Sequence[Row], paper: Paper) -> None:
    """Write layers beside the rows of one type, or names where types differ."""
    every = max(1, math.ceil(len(rows) / 16))
    told = [i for i in range(len(rows)) if i % every == 0]
    same = len({row.type for row in rows}) == 1
    texts = [plain(rows[i].layer if same else shortened(rows[i].short, 22)) for i in told]
    ax.set_yticks([i + 0.5 for i in told], texts, fontsize=6.5, color=paper.faint)


def _label_types(ax: Axes, block: str, rows: Sequence[Row], paper: Paper) -> None:
    """Write types beside their rows, with a line between two, where there is room."""
    room = _inches(len(rows)) * 72 / len(rows)  # points of a row
    at, places, texts = 0, [], []
    for kind, members in groupby(rows, key=lambda row: row.label):
        many = len(list(members))
        if many * room >= 6:
            places.append(at + many / 2)
            texts.append(plain(shortened(kind.removeprefix(block).lstrip("*._"), 30)))
        at += many
        if at < len(rows):
            ax.axhline(at, color=paper.ground, linewidth=0.8)
    ax.set_yticks(places, texts, fontsize=6, color=paper.faint)


def _summary(inspection: Inspection) -> str:
    ranks = sum(m.rank for m in inspection.modules)
    effective = sum(m.rank_effective for m in inspection.modules)
    above = sum(m.rank_above_noise for m in inspection.modules)
    return (
        f"{len(inspection.modules)} modules, {inspection.params:,} parameters; total rank {ranks}, effective "
        f"{effective:.0f} (cyan), above the noise {above} (white). "
        "Across: directions; down: layers; grey: beyond the rank."
    )
