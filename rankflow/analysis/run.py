"""A run as its ledger shows it, from another terminal: where it stands and when ranks change next."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankflow.errors import CheckpointError
from rankflow.plans.names import arrange
from rankflow.training.ledger import Event, Ledger

if TYPE_CHECKING:
    from rich.console import RenderableType

NAME = "rankflow.jsonl"
_EVENTS = 6


@dataclass(frozen=True)
class Standing:
    """Where a run stands at a moment, as far as its ledger tells: it is written to when something happens, and not in
    between.

    step: of the last event. due: step of the next decision, None if there is no more. wait: seconds until then at the
    pace between the last two steps with events, negative if it is late; None where no pace is known. finished: the run
    has said that it is over.
    """

    step: int
    total_steps: int
    policy: str
    budget: str
    total_rank: int
    params: int
    due: int | None
    wait: float | None
    finished: bool


def standing(ledger: Ledger, now: float) -> Standing:
    """`ledger` read with its times; `now` in seconds since 1970.

    Raises:
        CheckpointError: the ledger does not begin with an attach.
    """
    layout, events = ledger.layout(), ledger.events
    phases = [e for e in events if e["event"] == "phase"]
    due = _due(events[0], phases, events[-1]["step"])
    finished = events[-1]["event"] == "finish"
    return Standing(
        step=events[-1]["step"],
        total_steps=events[0].get("total_steps", 0),
        policy=phases[-1]["policy"] if phases else "",
        budget=(phases[-1].get("budget") if phases else None) or "",
        total_rank=layout.total_rank,
        params=layout.params,
        due=None if finished else due,
        wait=None if finished or due is None else _wait(events, due, now),
        finished=finished,
    )


def _due(attach: Event, phases: Sequence[Event], step: int) -> int | None:
    """The next step at which the present phase decides, or where the next one begins."""
    if not phases or not phases[-1].get("decides"):
        return None
    decides = phases[-1]["decides"]
    due = decides["first"] + max(0, (step - decides["first"]) // decides["every"] + 1) * decides["every"]
    if due < decides["before"]:
        return due
    begins = [phase["begin"] for phase in attach.get("phases", ()) if phase["begin"] > step]
    return min(begins, default=None)


def _wait(events: Sequence[Event], due: int, now: float) -> float | None:
    """Seconds until step `due`, at the pace of the last stretch of steps between two events."""
    last = events[-1]
    before = next((e for e in reversed(events) if e["step"] < last["step"]), None)
    if before is None or "time" not in before or "time" not in last:
        return None
    first = next(e for e in events if e["step"] == last["step"])  # a decision takes time of its own
    pace = (first.get("time", last["time"]) - before["time"]) / (last["step"] - before["step"])
    return last["time"] + pace * (due - last["step"]) - now


def find_ledger(run: Path) -> Path:
    """The ledger of a run, given it or the folder that holds it.

    Raises:
        CheckpointError: there is none, nor a folder that one may come to.
    """
    if run.suffix == ".jsonl":
        if not run.parent.is_dir():
            raise CheckpointError(f"{run}: no such ledger, and no folder that it may come to")
        return run
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such folder; give a run's ledger, or the folder that holds its {NAME}")
    found = sorted(run.glob(f"*/{NAME}"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found and not (run / NAME).exists() else run / NAME


def follow(path: Path, every: float) -> Iterator[Ledger | None]:
    """The ledger each time it has changed or `every` seconds have gone by, None before there is one; ends with the
    run. A line that is being written is left for the next time."""
    while True:
        ledger = Ledger.read(path, times=True) if path.is_file() and path.stat().st_size else None
        yield ledger
        if ledger is not None and ledger.events[-1]["event"] == "finish":
            return
        time.sleep(every)


def view(ledger: Ledger, now: float) -> RenderableType:
    """What `rankflow watch` shows: where the run stands, ranks by type and layer, the last events."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    from rankflow.render.tables import events_table

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
    from rich.table import Table

    from rankflow.render.tables import rank_bars

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
