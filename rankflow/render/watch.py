"""What `rankflow watch` shows of a run that goes on elsewhere."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table

from rankflow.analysis.run import Standing, standing
from rankflow.plans.names import arrange
from rankflow.render.run_tables import events_table
from rankflow.render.table import rank_bars
from rankflow.training.ledger import Ledger

_EVENTS = 6


def view(ledger: Ledger, now: float) -> RenderableType:
    """Where the run stands, ranks by type and layer, the last events."""
    at = standing(ledger, now)
    head = Table.grid(padding=(0, 2))
    head.add_row("step", f"{at.step:,} of {at.total_steps:,}", ProgressBar(at.total_steps or 1, at.step, width=30))
    head.add_row("policy", at.policy, f"budget {at.budget}" if at.budget else "")
    head.add_row("ranks", f"{at.total_rank:,} in all", f"{at.params:,} parameters")
    head.add_row("next", *_next(at))
    return Group(head, "", _by_layer(ledger), events_table(ledger.events[-_EVENTS:]))


def _next(at: Standing) -> tuple[str, str]:
    if at.finished:
        return "nothing", "the run is over"
    if at.due is None:
        return "nothing is due", ""
    if at.wait is None:
        return f"step {at.due:,}", ""
    return f"step {at.due:,}", f"in some {_clock(at.wait)}" if at.wait >= 0 else f"late by {_clock(-at.wait)}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _by_layer(ledger: Ledger) -> RenderableType:
    ranks = ledger.layout().ranks
    top = max(1, *ranks.values())
    table = Table(title="Ranks", title_justify="left")
    table.add_column("type")
    table.add_column("by layer")
    for heading in ("least", "mean", "most"):
        table.add_column(heading, justify="right")
    rows = arrange(ranks)
    for kind in dict.fromkeys(row.type for row in rows):
        these = [ranks[row.name] for row in rows if row.type == kind]
        table.add_row(
            kind, rank_bars(these, top, absent="·"), str(min(these)), f"{sum(these) / len(these):.1f}", str(max(these))
        )
    return table
