"""What a run did, for programs: `rankflow report --json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rankflow.training.ledger import Ledger


@dataclass(frozen=True)
class RunEvent:
    """One line of the ledger.

    event: attach, phase, resize, skip, fold or finish. step: the optimizer step that it came after.
    policy: the phase's. reason: why ranks changed, or did not. ranks: of the modules that were resized.
    total_rank: of the adapter, afterwards. margin: how close the decision was, as the share by which a direction that
    was taken scores above one that was not. gates: module -> what its gate came to, of a fold; total: all of them.
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
    """`ranks`: one for each of the run's `steps`."""

    name: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """A run, as its ledger tells it.

    total_steps: that it was planned for. steps: 0 or where it began, and every step that a resize came after.
    total_ranks: of the adapter, one for each of these.
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
        events=tuple(_event(line) for line in ledger.events),
    )


def _event(line: Mapping[str, Any]) -> RunEvent:
    named = ("policy", "reason", "ranks", "total_rank", "gates", "total")
    margin = (line.get("plan") or {}).get("margin")
    return RunEvent(line["event"], int(line["step"]), margin=margin, **{k: line[k] for k in named if k in line})
