"""A run as its ledger tells it: what it did, where it stands, and when ranks change next."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankflow.errors import CheckpointError, first_line
from rankflow.formats.io.strict_json import read_text
from rankflow.training.ledger import Event, Ledger

NAME = "rankflow.jsonl"
_STATE = "trainer_state.json"


@dataclass(frozen=True)
class RunEvent:
    """One line of the ledger.

    event: attach, phase, resize, skip, fold or finish. step: the optimizer step that it came after.
    policy: the phase's. reason: why ranks changed, or did not. ranks: of the modules that were resized.
    total_rank: of the adapter, afterwards. margin: how close the decision was, as the share by which a direction that
    was taken scores above one that was not. gates: of a fold, module -> what its gate came to. total: of a fold, what
    all gates together came to.
    """

    event: str
    step: int
    policy: str | None = None
    reason: str | None = None
    ranks: dict[str, int] | None = None
    total_rank: int | None = None
    margin: float | None = None
    gates: dict[str, dict[str, float]] | None = None
    total: dict[str, float] | None = None


@dataclass(frozen=True)
class RunModule:
    """A module over the run.

    name: the module's, in the base model. ranks: one for each of the run's `steps`.
    """

    name: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """A run, as its ledger tells it.

    total_steps: optimizer steps that it was planned for. steps: 0 or where it began, and every step that a resize came
    after.
    total_ranks: of the adapter, one for each of `steps`. source: the path of the ledger.
    modules: the rank of each over the run. events: every line of the ledger.
    """

    source: str
    total_steps: int | None
    steps: tuple[int, ...]
    total_ranks: tuple[int, ...]
    modules: tuple[RunModule, ...]
    events: tuple[RunEvent, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_of(ledger: Ledger, source: str) -> Run:
    """
    Raises:
        CheckpointError: the ledger does not begin with an attach.
    """
    history = ledger.history()
    return Run(
        source=source,
        total_steps=ledger.events[0].get("total_steps"),
        steps=tuple(step for step, _ in history),
        total_ranks=tuple(sum(ranks.values()) for _, ranks in history),
        modules=tuple(RunModule(name, tuple(ranks[name] for _, ranks in history)) for name in history[0][1]),
        events=tuple(_run_event(line) for line in ledger.events),
    )


def _run_event(line: Mapping[str, Any]) -> RunEvent:
    named = ("policy", "reason", "ranks", "total_rank", "gates", "total")
    margin = (line.get("plan") or {}).get("margin")
    return RunEvent(line["event"], int(line["step"]), margin=margin, **{k: line[k] for k in named if k in line})


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
    """The ledger of a run, given it, the folder that holds it, or an adapter or a checkpoint that was saved below that.

    Raises:
        CheckpointError: there is none, nor a folder that one may come to.
    """
    if run.suffix == ".jsonl":
        if not run.parent.is_dir():
            raise CheckpointError(f"{run}: no such ledger, and no folder that it may come to")
        return run
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such folder; give a run's ledger, or the folder that holds its {NAME}")
    if (run / NAME).exists():
        return run / NAME
    found = sorted(run.glob(f"*/{NAME}"), key=lambda path: path.stat().st_mtime)
    if not found and (run / "adapter_config.json").exists():
        found = [path for folder in run.resolve().parents[1::-1] if (path := folder / NAME).exists()]
    return found[-1] if found else run / NAME


def losses_beside(ledger: Path) -> list[tuple[int, float]]:
    """(step, loss) as the Trainer logged them in the `trainer_state.json` beside a ledger, or else in its newest
    checkpoint there. A file that cannot be read is warned of."""
    checkpoints = sorted(ledger.parent.glob(f"checkpoint-*/{_STATE}"), key=_step_of)
    for path in (ledger.parent / _STATE, *reversed(checkpoints)):
        if path.is_file():
            try:
                state = json.loads(read_text(path), parse_constant=lambda _: None)  # NaN is no loss to draw
                logged = [(int(line["step"]), line["loss"]) for line in state["log_history"] if "loss" in line]
                numbers = [(step, float(loss)) for step, loss in logged if isinstance(loss, int | float)]
                if strange := len([loss for _, loss in logged if loss is not None]) - len(numbers):
                    warnings.warn(f"{path}: {strange} losses are no numbers and are left out", stacklevel=2)
                return numbers
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
                warnings.warn(f"{path}: no losses are read from it ({first_line(e)})", stacklevel=2)
                return []
    return []


def _step_of(state: Path) -> int:
    number = state.parent.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def follow(path: Path, every: float) -> Iterator[Ledger | None]:
    """The ledger each time it has changed or `every` seconds have gone by, None before there is one; ends with the
    run. A line that is being written is left for the next time."""
    while True:
        ledger = Ledger.read(path, times=True) if path.is_file() and path.stat().st_size else None
        yield ledger
        if ledger is not None and ledger.events[-1]["event"] == "finish":
            return
        time.sleep(every)
