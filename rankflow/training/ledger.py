"""Append-only record of what was done and why: a JSON object a line. Replayed on the first layout it gives the last.

Events: `attach` (the layout everything starts from), `resize` (plan, new ranks), `skip` (a decision that was due and
not taken, and why), `phase` (its budget, and when it decides), `fold` (what gates report as they become part of the
factors), `restore` (everything after the first `events` ones is void) and `finish`. On disk a line has the `time` it
was written too, in seconds since 1970, which is no part of the event: two equal runs have equal events.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, ValidationError
from safetensors.torch import load_file, save_file

from rankflow.errors import CheckpointError, PlanError
from rankflow.formats.io.disk import make_folder, sync, sync_open
from rankflow.lora.transaction import Transaction
from rankflow.plans.layout import Layout
from rankflow.plans.plan import RankPlan

Event = dict[str, Any]


def _plain(text: str) -> str:
    if not text.replace("\n", " ").isprintable():
        raise ValueError("has characters that cannot be printed")
    return text


Count = Annotated[int, Field(ge=0, le=1 << 40)]
Text = Annotated[str, Field(max_length=10_000), AfterValidator(_plain)]
Name = Annotated[str, Field(max_length=1000), AfterValidator(_plain)]


class _Spec(BaseModel):
    """A part of an event; more fields than these may be there, for people to read."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Op(_Spec):
    op: str
    idx: list[Count] = []
    shape: Annotated[list[Count], Field(min_length=2)] = [0, 0]
    n: Count = 0
    on: bool = True
    group: Name | None = None


class _Plan(_Spec):
    ops: dict[Name, list[_Op]]
    margin: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None


class _Slot(_Spec):
    rank: Count
    in_features: Count
    out_features: Count
    scaling: FiniteFloat
    buckets: list[Count] = []


class _Phase(_Spec):
    begin: Count


class _Decides(_Spec):
    first: Count
    before: Count
    every: Annotated[Count, Field(ge=1)]


class _Event(_Spec):
    """The fields of an event that every reader of a ledger relies on."""

    event: Name
    step: Count
    time: Annotated[FiniteFloat, Field(ge=0, le=1e12)] = 0.0
    layout: dict[Name, _Slot] | None = None
    total_steps: Count = 0
    plan: _Plan | None = None
    phases: list[_Phase] = []
    decides: _Decides | None = None
    budget: Text | None = None
    policy: Name = ""
    reason: Text = ""
    notes: list[Text] = []
    ranks: dict[Name, Count] = {}
    total_rank: Count = 0
    events: NonNegativeInt = 0
    gates: dict[Name, dict[Name, FiniteFloat]] = {}
    total: dict[Name, FiniteFloat] | None = None


_REQUIRED = {"attach": {"layout"}, "resize": {"plan"}, "phase": {"policy"}, "fold": {"policy", "gates", "total"}}
_REQUIRED |= {"restore": {"events"}}
_KNOWN = {*_REQUIRED, "skip", "finish"}
_BEGINNING = b'{"event": "attach", "step": '  # of a first line, which a crash may have cut short


class Ledger:
    """The events of one run, in memory and, with a `path`, line by line on disk.

    A line is written whole or not at all, and synced before `append` returns; a last line cut short by a crash is
    dropped when the file is next opened. What is appended in a `together` block is written at its end, all of it or
    nothing. With `keep_matrices` the matrices of each plan lie beside the ledger, and are on disk before the line that
    names them.

    Raises:
        CheckpointError: at the path is something other than a ledger, which is left as it is; or a damaged one.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, keep_matrices: bool = False):
        self.path = Path(path) if path is not None else None
        self.keep_matrices = keep_matrices
        self.source = self.path  # what messages are about
        self.events: list[Event] = []
        self._waiting: list[Event] | None = None  # of a `together` block
        if self.path is not None and self.path.is_dir():
            raise CheckpointError(f"{self.path}: is a folder; a ledger is a file, so give it a name in there")
        if self.path is not None and self.path.is_file():
            self.events = _effective(_read_lines(self.path, mend=True))

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, times: bool = False) -> Ledger:
        """Load a ledger to look at; the file is not touched. With `times` events have the `time` of their lines.

        Raises:
            CheckpointError: no such file, or a line that is not a ledger's.
        """
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such ledger")
        ledger = cls()
        ledger.source = Path(path)
        ledger.events = _effective(_read_lines(Path(path), times=times))
        if not ledger.events:
            raise CheckpointError(f"{path}: the ledger is empty")
        return ledger

    def append(self, event: str, step: int, plan: RankPlan | None = None, **fields: Any) -> Event:
        line: Event = {"event": event, "step": step, **fields}
        if plan is not None:
            line["plan"] = plan.to_json()
        if self.path is not None and plan is not None and self.keep_matrices:
            line["matrices"] = self._save_matrices(step, plan)
        self._write([line])
        self.events = _followed(self.events, line)
        return line

    def begin(self, transaction: Transaction) -> None:
        """Hold back what is appended from here on until `write`; `transaction` undoes it, in memory and in the file."""
        transaction.undo(partial(self._forget, self.events, len(self.events)))
        transaction.attr(self, "_waiting", [])

    def write(self, transaction: Transaction, attempt: Callable[[Callable[[], None]], object]) -> None:
        """Write what waits, all of it or nothing; `attempt` is handed the writing, if there is anything to write."""
        lines, self._waiting = self._waiting, None
        if lines:
            if self.path is not None:
                transaction.undo(partial(_cut, self.path, self.path.stat().st_size if self.path.exists() else 0))
            attempt(lambda: self._write(lines))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write the events of the block together at its end; where the block or the writing fails, none of them. Inside
        another such block it is part of that."""
        if self._waiting is not None:
            yield
            return
        with Transaction() as transaction:
            self.begin(transaction)
            yield
            self.write(transaction, lambda write: write())

    def _write(self, lines: list[Event]) -> None:
        if self._waiting is not None:
            self._waiting += lines
        elif self.path is not None:
            _append_lines(self.path, lines)

    def _forget(self, events: list[Event], known: int) -> None:
        """Go back to the first events of the list that there was then."""
        del events[known:]
        self.events = events

    def restore(self, events: list[Event], step: int) -> None:
        """Go on from an earlier point: `events` are those the checkpoint at `step` had seen."""
        known = self.events[: len(events)] == events
        with self.together():
            if not known:  # another file or an empty one: carry the history over, so that this ledger alone replays
                self._write(events)
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
        what = self.source or "the ledger"
        if not self.events or self.events[0]["event"] != "attach":
            raise CheckpointError(f"{what}: does not begin with an attach event; it is not whole")
        try:
            layout = Layout.from_json(self.events[0]["layout"])
            out = [(int(self.events[0]["step"]), layout)]
            for event in self.events:
                if event["event"] == "resize":
                    layout = RankPlan.from_json(event["plan"]).apply_to(layout)
                    out.append((int(event["step"]), layout))
        except (KeyError, TypeError, ValueError, RuntimeError, PlanError) as e:
            raise CheckpointError(f"{what}: cannot be replayed ({ascii(str(e))[:200]}); it is damaged") from None
        if not layout:
            raise CheckpointError(f"{what}: is of a run without modules; it is damaged")
        return out

    def _save_matrices(self, step: int, plan: RankPlan) -> str:
        assert self.path is not None
        make_folder(self.path.parent)
        at_step = itertools.takewhile(lambda event: event["step"] == step, reversed(self.events))
        earlier = sum("matrices" in event for event in at_step)
        name = f"{self.path.stem}-step-{step:06d}{f'-{earlier + 1}' if earlier else ''}.safetensors"
        half = self.path.parent / f".{name}.part"
        save_file({"flat": plan.pack()}, half)
        sync(half)
        os.replace(half, self.path.parent / name)
        sync(self.path.parent)
        return name


def _effective(events: list[Event]) -> list[Event]:
    """The events that no later `restore` or `attach` has made void."""
    out: list[Event] = []
    for event in events:
        out = _followed(out, event)
    return out


def _cut(path: Path, size: int) -> None:
    """Cut the file back to an earlier size."""
    if path.is_file() and path.stat().st_size > size:
        os.truncate(path, size)


def _followed(events: list[Event], event: Event) -> list[Event]:
    """The events that hold after one more, in the same list where all of them do: a restore voids what came after its
    point, an attach begins anew."""
    if event["event"] == "restore":
        return events[: event["events"]]
    if event["event"] == "attach":
        return [event]
    events.append(event)
    return events


def _append_lines(path: Path, lines: list[Event]) -> None:
    timed = [{**line, "time": round(time.time(), 3)} for line in lines]
    left = "".join(json.dumps(line, allow_nan=False) + "\n" for line in timed).encode()
    make_folder(path.parent)
    new = not path.exists()
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    size = os.fstat(fd).st_size
    try:
        while left:  # a disk that is nearly full takes a part of it first
            left = left[os.write(fd, left) :]
        sync_open(fd, path)
        if new:
            sync(path.resolve().parent)
    except BaseException:
        if path.is_file():  # not a pipe
            os.ftruncate(fd, size)
        raise
    finally:
        os.close(fd)


def _read_lines(path: Path, *, mend: bool = False, times: bool = False) -> list[Event]:
    """Read the events of a file; with `mend`, cut a last line off that a crash has left in part.

    Raises:
        CheckpointError: a line that is not a ledger's; nothing is mended then.
    """
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    events = [_read_line(text, path, number, times) for number, text in enumerate(raw[:whole].splitlines(), 1)]
    if mend and raw and not _begins_ledger(raw, events):
        raise CheckpointError(f"{path}: is there already, and is no ledger; give the ledger another name")
    if mend and whole < len(raw):
        os.truncate(path, whole)
    return events


def _begins_ledger(raw: bytes, events: list[Event]) -> bool:
    if events:
        return events[0]["event"] in _KNOWN
    return _BEGINNING.startswith(raw) or re.match(rb"%b\d+(, |,?$)" % re.escape(_BEGINNING), raw) is not None


def _read_line(text: bytes, path: Path, number: int, times: bool) -> Event:
    try:
        event = json.loads(text)
        seen = _Event.model_validate(event).model_fields_set
        if missing := _REQUIRED.get(event["event"], set()) - seen:
            raise ValueError(f"{missing.pop()} is missing")
        if not times:
            event.pop("time", None)
    except (ValueError, RecursionError) as e:
        what = (
            "the file is damaged" if number > 1 else "the file is damaged, or no ledger; give the ledger another name"
        )
        raise CheckpointError(f"{path}, line {number}: not a ledger event{_why(e)}; {what}") from None
    return event


def _why(e: Exception) -> str:
    if not isinstance(e, ValidationError):
        return ""
    first = e.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part)[:80] for part in first["loc"])
    return f" ({place!a}: {first['msg']})"
