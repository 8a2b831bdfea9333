"""Compare two runs of one policy: whether they decided the same, and if not where, how and how narrowly they differ
first.

A decision is what became of the directions of every module. Numbers beside it, such as energies and the SHA-256 of
matrices, may differ in their last digits between machines, or between one process and several that see the same data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankflow.plans.allocate import closest
from rankflow.training.ledger import Event, Ledger

_BESIDE = ("seconds", "time", "matrices")  # of an event: where and when it happened
_BEGINNINGS = {"seed": "seed", "total_steps": "total steps"}  # of an attach -> in words
_NUMBERS = ("N", "M", "sketch")  # of an op: what its matrices hold


@dataclass(frozen=True)
class Parting:
    """What two runs make of a module at the step where they part, in words.

    name: the module's, in the base model. first: what the first run made of it. second: what the second did.
    """

    name: str
    first: str
    second: str


@dataclass(frozen=True)
class Comparison:
    """Two ledgers side by side.

    first, second: the paths of the two ledgers.
    decisions: resizes and skips that are the same, up to where the runs part.
    until: the step up to which there is something to compare, where a run has not finished.
    step: the first at which decisions differ; null if none do. did: what each run did at that step.
    modules: those of which they made something else. margins: how close each decision there was, where that is known:
    the least share by which a direction that was taken scores above one that was not.
    numbers: the first step at which anything recorded differs, but for times.
    started: what the runs did not begin with alike, in words.
    """

    first: str
    second: str
    decisions: int
    until: int | None
    step: int | None
    did: tuple[str, str] | None
    modules: tuple[Parting, ...]
    margins: tuple[float | None, float | None] | None
    numbers: int | None
    started: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether all decisions are the same."""
        return self.step is None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "same": self.same}

    def __str__(self) -> str:
        """The verdict, in a sentence or two; of runs that part, `comparison_table` shows the rest."""
        beginning = f" They begin with {' and '.join(self.started)}." if self.started else ""
        compared = "" if self.until is None else f" Compared up to step {self.until}, as far as both have come."
        if self.step is not None:
            alike = f"the first {self.decisions} decisions are" if self.decisions != 1 else "the first decision is"
            return f"{alike} the same, and at step {self.step} they part.{beginning}{compared}"
        numbers = ", and all that was recorded with them"
        if self.numbers is not None:
            numbers = f"; numbers beside them differ from step {self.numbers} on, in their last digits if all is well"
        return f"the same {self.decisions} decisions{numbers}.{beginning}{compared}"


def compare(first: Ledger, second: Ledger, sources: tuple[str, str] = ("first", "second")) -> Comparison:
    """
    Raises:
        CheckpointError: a ledger does not begin with an attach.
    """
    ledgers = (first, second)
    histories = [ledger.history() for ledger in ledgers]
    until = min(_end(ledger.events) for ledger in ledgers)
    events = [_by_step(ledger.events, until) for ledger in ledgers]
    decisions, parted, numbers = 0, None, None
    for step in sorted({*events[0], *events[1]}):
        here = [of.get(step, []) for of in events]
        if numbers is None and _recorded(here[0]) != _recorded(here[1]):
            numbers = step
        if _decided(here[0]) != _decided(here[1]):
            parted = step
            break
        decisions += sum(event["event"] in ("resize", "skip") for event in here[0])
    found = [] if parted is None else [events[i].get(parted, []) for i in range(2)]
    return Comparison(
        *sources,
        decisions=decisions,
        until=None if math.isinf(until) else int(until),
        step=parted,
        did=(_did(found[0]), _did(found[1])) if found else None,
        modules=_partings(found, histories, parted) if parted is not None else (),
        margins=(_margin(found[0]), _margin(found[1])) if found else None,
        numbers=numbers,
        started=_started(first.events[0], second.events[0]),
    )


# -- parts ----------------------------------------------------------------------------------------------------------


def _end(events: Sequence[Event]) -> float:
    """The last step of which it is known what the run did, and did not do."""
    return math.inf if events[-1]["event"] == "finish" else int(events[-1]["step"])


def _by_step(events: Sequence[Event], until: float) -> dict[int, list[Event]]:
    found: dict[int, list[Event]] = {}
    for event in events:
        if event["step"] <= until:
            found.setdefault(int(event["step"]), []).append(event)
    return found


def _recorded(events: Iterable[Event]) -> list[Event]:
    return [{key: value for key, value in event.items() if key not in _BESIDE} for event in events]


def _decided(events: Iterable[Event]) -> list[tuple[Any, ...]]:
    return [(event["event"], event.get("policy"), _of_each(event)) for event in events]


def _of_each(event: Event) -> Mapping[str, Any]:
    """Module -> what becomes of it: its rank at the start, its ops in a plan."""
    if event["event"] == "attach":
        return {name: slot["rank"] for name, slot in event["layout"].items()}
    ops = (event.get("plan") or {}).get("ops", {})
    return {name: [{k: v for k, v in op.items() if k not in _NUMBERS} for op in of] for name, of in ops.items()}


def _did(events: Sequence[Event]) -> str:
    named = [f"{e['event']}, {e['policy']}" if e.get("policy") else e["event"] for e in events]
    return "; ".join(named) or "nothing"


def _margin(events: Iterable[Event]) -> float | None:
    return closest((event.get("plan") or {}).get("margin") for event in events)


def _partings(
    found: Sequence[Sequence[Event]], histories: Sequence[Sequence[tuple[int, dict[str, int]]]], step: int
) -> tuple[Parting, ...]:
    plans = [[_of_each(event) for event in events if event["event"] == "resize"] for events in found]
    before = [_ranks(history, step - 1) for history in histories]
    after = [_ranks(history, step) for history in histories]
    partings = []
    for name in dict.fromkeys([*after[0], *after[1]]):
        ops = [[op for plan in of for op in plan.get(name, ())] for of in plans]
        ranks = [(before[i].get(name), after[i].get(name)) for i in range(2)]
        if ops[0] != ops[1] or ranks[0] != ranks[1]:
            alike = ranks[0] == ranks[1]
            partings.append(Parting(name, *(_words(*ranks[i], ops[i] if alike else ()) for i in range(2))))
    return tuple(partings)


def _ranks(history: Sequence[tuple[int, dict[str, int]]], step: int) -> dict[str, int]:
    """Return the ranks after everything up to `step`; those at the start if nothing happened."""
    so_far = [ranks for at, ranks in history if at <= step]
    return so_far[-1] if so_far else history[0][1]


def _words(before: int | None, after: int | None, ops: Sequence[Mapping[str, Any]]) -> str:
    if after is None:
        return "is not there"
    ranks = f"stays at {after}" if before == after else f"{before} to {after}"
    detail = [_op(op) for op in ops]
    return f"{ranks} ({', '.join(detail)})" if detail else ranks


def _op(op: Mapping[str, Any]) -> str:
    match op["op"]:
        case "keep":
            return f"keeps {', '.join(map(str, op['idx']))}"
        case "grow":
            return f"grows {op['n']}"
        case "refactor":
            return "in another basis"
        case "train":
            return "trains" if op["on"] else "is frozen"
        case "drop":
            return "leaves the adapter"
    return "changes otherwise"


def _started(first: Event, second: Event) -> tuple[str, ...]:
    pairs = {word: (first.get(key), second.get(key)) for key, word in _BEGINNINGS.items()}
    return tuple(f"{word} {a!a} and {b!a}" for word, (a, b) in pairs.items() if a != b)
