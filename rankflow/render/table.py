"""A table: made once by each report, shown on a terminal and in an HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from textwrap import wrap

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from rankflow.plans.names import Row, shortened, shown

_LONGEST = 500  # characters of a cell on a terminal
_NAME = 44  # characters of the name of a module
_NARROW = 24  # characters of it that stand in a line, at least, however narrow the terminal
_HEADING = 9  # characters of a line of a heading over numbers, which are seldom wider
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Column:
    """A column of numbers, or of text. `means` is shown over its heading in a page; a column that is `wide` stands in
    pages only, and one that can be `spared` not on terminals that are too narrow for all."""

    name: str
    means: str = ""
    text: bool = False
    wide: bool = False
    spared: bool = False

    @property
    def heading(self) -> str:
        """The name as it stands on a terminal, in several lines over numbers."""
        name = shown(self.name, most=_LONGEST)
        return name if self.text else "\n".join(wrap(name, _HEADING, break_long_words=False))


@dataclass(frozen=True)
class Cell:
    """What is shown, and the `value` that its column is sorted by in a page.

    `title` is shown over it in a page, such as the whole of a long name. Beside it stands a bar of length `share`, or
    in a page a `curve` (an SVG path with a `line` across it) that `says` what it shows. `marked` cells need attention.
    """

    text: str
    value: str | float = ""
    title: str = ""
    long: bool = False
    share: float | None = None
    curve: str = ""
    line: float | None = None
    says: str = ""
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under headings. `total` sums them up; a terminal draws a line before the rows with the numbers `breaks`."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    total: Sequence[Cell] | None = None
    breaks: frozenset[int] = frozenset()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table as rich draws it: on a narrow terminal names are folded, numbers never cut."""
        kept = self._fitting(options.max_width)
        spared = [c.name for i, c in enumerate(self.columns) if not c.wide and i not in kept]
        caption = [self.caption, *([f"too narrow for: {', '.join(spared)}"] if spared else [])]
        drawn = RichTable(
            title=Text(shown(self.title, most=_LONGEST), style="bold"),
            title_justify="left",
            caption=Text(shown("\n".join(filter(None, caption)), lines=True)) if any(caption) else None,
            caption_justify="left",
            box=SIMPLE_HEAD,
            padding=0,
        )
        for i in kept:
            drawn.add_column(
                Text(self.columns[i].heading),
                justify="left" if self.columns[i].text else "right",
                no_wrap=not self.columns[i].text,
                overflow="fold",
            )
        for at, row in enumerate(self.rows):
            if at in self.breaks:
                drawn.add_section()
            drawn.add_row(*(_drawn(row[i]) for i in kept))
        if self.total is not None:
            drawn.add_section()
            drawn.add_row(*(_drawn(self.total[i]) for i in kept), style="bold")
        yield drawn

    def _fitting(self, width: int) -> list[int]:
        """The numbers of the columns that are drawn: the last of those that can be spared are left out, as many as
        there is no room for beside names of `_NARROW` characters."""
        kept = [i for i, column in enumerate(self.columns) if not column.wide]
        rows = [*self.rows, *([self.total] if self.total is not None else [])]
        needs: dict[int, int] = {}
        for i in kept:
            texts = [*self.columns[i].heading.split("\n"), *(_drawn(row[i]).plain for row in rows)]
            needs[i] = min(max(map(cell_len, texts)), _NARROW if self.columns[i].text else width)
        for i in [i for i in reversed(kept) if self.columns[i].spared]:
            if sum(needs[i] for i in kept) + len(kept) + 1 > width:
                kept.remove(i)
        return kept


def _drawn(cell: Cell) -> Text:
    """One line, whatever is in the cell."""
    return Text(shown(cell.text, most=_LONGEST), style="yellow" if cell.marked else "")


# -- cells ------------------------------------------------------------------------------------------------------------


def word(text: str, title: str = "", *, long: bool = False, marked: bool = False) -> Cell:
    return Cell(text, value=text, title=title, long=long, marked=marked)


def module(short: str, name: str) -> Cell:
    """The name of a module, shortened in the middle; the whole of it is over it in a page."""
    return Cell(shortened(short, _NAME), value=short, title=name)


def number(value: float | None, form: str = "{:,}", *, marked: bool = False) -> Cell:
    """Return a cell with a number; empty for None, which sorts last."""
    return Cell("", value="") if value is None else Cell(form.format(value), value=value, marked=marked)


def span(values: Iterable[float], form: str = "{:,}", *, marked: bool = False) -> Cell:
    """From the least to the largest of some numbers, sorted by their mean."""
    low, high = min(values := list(values)), max(values)
    text = form.format(low) if low == high else f"{form.format(low)} to {form.format(high)}"
    return Cell(text, value=math.fsum(values) / len(values), marked=marked)


def share(value: float) -> Cell:
    """A share of 1, with a bar beside it in a page."""
    return Cell(f"{value:.1%}", value=value, share=min(1.0, max(0.0, value)))


def curve(sigma: Sequence[float], top: float, line: float | None = None, *, decades: float = 3.0) -> Cell:
    """Singular values: in a page as steps of their logarithm, the highest at `top`, with a line at one more value; on a
    terminal as bars relative to the first."""

    def height(value: float) -> float:
        return 20 * max(0.0, min(1.0, 1 + math.log10(value / top) / decades)) if value > 0 < top else 0.0

    wide = 100 / len(sigma)
    steps = "".join(f"V{20 - height(s):.2f}H{(i + 1) * wide:.2f}" for i, s in enumerate(sigma))
    at = 20 - height(line) if line is not None and line > 0 else None
    return Cell(
        _bars(sigma),
        value=sigma[0],
        curve=f"M0 20{steps}V20Z",
        line=at,
        says=f"singular values from {sigma[0]:.3g} to {sigma[-1]:.3g}",
    )


def _bars(sigma: Sequence[float], width: int = 8) -> str:
    """Singular values relative to the first, each of at most `width` bars half a decade a step."""
    if not sigma[0] > 0:
        return "zero"
    picked = [sigma[i * len(sigma) // min(width, len(sigma))] for i in range(min(width, len(sigma)))]
    heights = [7 + 2 * math.log10(max(s / sigma[0], 1e-4)) for s in picked]
    return "".join(_BARS[max(0, round(h))] for h in heights)


def rank_bars(ranks: Iterable[int], top: int, absent: str = " ") -> str:
    """A bar for each rank, `top` being the highest."""
    return "".join(absent if r == 0 else _BARS[math.ceil(r / top * 8) - 1] for r in ranks)


def figure(value: float | None) -> Cell:
    """A whole number as it is, any other with three digits."""
    return number(value, "{:.3g}" if value is not None and (value % 1 or value >= 1e5) else "{:.0f}")


def between_types(rows: Sequence[Row]) -> frozenset[int]:
    """Numbers of the rows that begin another type of module."""
    return frozenset(i for i, (one, other) in enumerate(pairwise(rows), 1) if one.type != other.type)
