"""Append-only record of what was done and why: a JSON object a line. Replayed on the first layout it gives the last.

Events: `attach` (the layout everything starts from), `resize` (plan, new ranks), `skip` (a decision that was due and
not taken, and why), `phase`, `restore` (everything after the first `events` ones is void) and `finish`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from rankflow.errors import CheckpointError
from rankflow.plan import Layout, RankPlan, replay

Event = dict[str, Any]


class Ledger:
    """The events of one run, in memory and, with a `path`, line by line on disk.

    A line is written whole, in one call, and synced before `append` returns; a last line cut short by a crash is
    dropped when the file is next opened. With `keep_matrices` the matrices of each plan lie beside the ledger.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, keep_matrices: bool = False):
        self.path = Path(path) if path is not None else None
        self.keep_matrices = keep_matrices
        self.events: list[Event] = []
        if self.path is not None and self.path.exists():
            self.events = _effective(_read_lines(self.path, mend=True))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Ledger:
        """Load a ledger to look at; the file is not touched.

        Raises:
            CheckpointError: no such file, or a line that is not a ledger's.
        """
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such ledger")
        ledger = cls()
        ledger.events = _effective(_read_lines(Path(path)))
        if not ledger.events:
            raise CheckpointError(f"{path}: the ledger is empty")
        return ledger

    def append(self, event: str, step: int, plan: RankPlan | None = None, **fields: Any) -> Event:
        line: Event = {"event": event, "step": step, **fields}
        if plan is not None:
            line["plan"] = plan.to_json()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if plan is not None and self.keep_matrices:
                line["matrices"] = self._save_matrices(step, plan)
            _append_line(self.path, line)
        self.events = _effective([*self.events, line])
        return line

    def restore(self, events: list[Event], step: int) -> None:
        """Go on from an earlier point: `events` are those the checkpoint at `step` had seen."""
        if self.events[: len(events)] != events:
            # Another file or an empty one: carry the history over, so that this ledger alone replays.
            for event in events:
                if self.path is not None:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    _append_line(self.path, event)
        self.events = list(events)
        self.append("restore", step, events=len(events))

    def layout(self) -> Layout:
        """The layout after all events, by replay alone.

        Raises:
            CheckpointError: the ledger does not begin with an attach.
        """
        return self._layouts()[-1][1]

    def history(self) -> list[tuple[int, dict[str, int]]]:
        """(step, ranks of all modules) at the start and after every resize."""
        return [(step, layout.ranks) for step, layout in self._layouts()]

    def plan(self, event: Event) -> RankPlan:
        """The plan of a `resize` event with its matrices, where they were kept.

        Raises:
            CheckpointError: they were not kept.
        """
        if self.path is None or "matrices" not in event:
            raise CheckpointError(f"step {event['step']}: matrices were not kept; attach a Ledger(keep_matrices=True)")
        return RankPlan.from_json(event["plan"], load_file(self.path.parent / event["matrices"])["flat"])

    def _layouts(self) -> list[tuple[int, Layout]]:
        if not self.events or self.events[0]["event"] != "attach":
            raise CheckpointError("the ledger does not begin with an attach event; it is not whole")
        layout = Layout.from_json(self.events[0]["layout"])
        out = [(int(self.events[0]["step"]), layout)]
        for event in self.events:
            if event["event"] == "resize":
                layout = replay(layout, event["plan"])
                out.append((int(event["step"]), layout))
        return out

    def _save_matrices(self, step: int, plan: RankPlan) -> str:
        assert self.path is not None
        name = f"{self.path.stem}-step-{step:06d}.safetensors"
        partial = self.path.parent / f".{name}.part"
        save_file({"flat": plan.pack()}, partial)
        os.replace(partial, self.path.parent / name)
        return name


def _effective(events: list[Event]) -> list[Event]:
    """Events that still hold: a restore voids what came after its point, an attach begins anew."""
    out: list[Event] = []
    for event in events:
        if event["event"] == "restore":
            out = out[: event["events"]]
        elif event["event"] == "attach":
            out = []
        if event["event"] != "restore":
            out.append(event)
    return out


def _append_line(path: Path, line: Event) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(fd, (json.dumps(line, allow_nan=False) + "\n").encode())
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_lines(path: Path, *, mend: bool = False) -> list[Event]:
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if mend and whole < len(raw):
        os.truncate(path, whole)
    events: list[Event] = []
    for number, text in enumerate(raw[:whole].splitlines(), 1):
        try:
            event = json.loads(text)
            if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                raise ValueError
        except ValueError:
            raise CheckpointError(f"{path}, line {number}: not a ledger event; the file is damaged") from None
        events.append(event)
    return events
